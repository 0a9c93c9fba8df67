//! Generated messages and services.
#![allow(missing_docs, unreachable_pub, clippy::all, reason = "generated code; its names are containerd's")]

/// containerd's packages, nested as the generated code expects them.
pub mod containerd {
    /// Common types.
    pub mod types {
        tonic::include_proto!("containerd.types");
    }

    /// Services.
    pub mod services {
        /// The snapshot service.
        pub mod snapshots {
            /// Its only version.
            pub mod v1 {
                tonic::include_proto!("containerd.services.snapshots.v1");
            }
        }
    }
}

pub use containerd::services::snapshots::v1 as snapshots;
pub use containerd::types;
