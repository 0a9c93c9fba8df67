//! The lock and the tasks of the modules whose races are tested: under the feature `shuttle` its scheduler decides who runs.

#[cfg(not(feature = "shuttle"))]
pub(crate) use parking_lot::Mutex;
#[cfg(not(feature = "shuttle"))]
pub(crate) use tokio::spawn;

#[cfg(feature = "shuttle")]
pub(crate) use explored::{Mutex, spawn};

#[cfg(feature = "shuttle")]
mod explored {
    pub(crate) use shuttle::future::spawn;

    /// A lock with the interface of `parking_lot`'s.
    #[derive(Debug, Default)]
    pub(crate) struct Mutex<T>(shuttle::sync::Mutex<T>);

    impl<T> Mutex<T> {
        pub(crate) fn lock(&self) -> shuttle::sync::MutexGuard<'_, T> {
            self.0.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
        }
    }
}
