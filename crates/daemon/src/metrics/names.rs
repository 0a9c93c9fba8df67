//! Every family that the endpoint may show. Names and operation types that the Go daemon has are its own.

use super::text::{Family, Kind};

macro_rules! families {
    ($($constant:ident = $name:literal $kind:ident [$($label:literal),*] $help:literal;)*) => {
        $(#[doc = $help] pub static $constant: Family =
            Family { name: $name, kind: Kind::$kind, help: $help, labels: &[$($label),*] };)*

        /// All of them.
        pub static ALL: &[&Family] = &[$(&$constant),*];
    };
}

families! {
    OPERATIONS = "soci_fs_operation_count" Counter ["layer", "operation_type"]
        "Operations, by layer; of the whole daemon where the layer is empty.";
    MILLISECONDS = "soci_fs_operation_duration_milliseconds" Histogram ["layer", "operation_type"]
        "Duration of slow operations in milliseconds, by layer; where the layer is empty, of blobs of no mounted layer, as zTOCs.";
    MICROSECONDS = "soci_fs_operation_duration_microseconds" Histogram ["layer", "operation_type"]
        "Duration of fast operations in microseconds.";
    SERVED = "soci_fs_bytes_served" Counter ["layer", "operation_type"]
        "Bytes of files that readers were given.";
    FETCHED_SIZE = "soci_fs_layer_fetched_size_bytes" Gauge ["digest", "mountpoint"]
        "Compressed bytes of a mounted layer that are cached.";
    SIZE = "soci_fs_layer_size_bytes" Gauge ["digest", "mountpoint"]
        "Compressed size of a mounted layer in bytes.";
    IMAGE_OPERATIONS = "soci_fs_image_operation_count_key" Gauge ["image", "operation_type"]
        "Operations of the mounted file systems of an image, by its manifest's digest; where the image is empty, of the whole daemon: layers that wait for the background.";
    IMAGE_NEEDED = "soci_image_needed_bytes" Gauge ["image"]
        "Compressed bytes of an image's mounted layers that readers touched since they were mounted.";
    IMAGE_FETCHED = "soci_image_fetched_bytes" Gauge ["image"]
        "Compressed bytes of an image's mounted layers that are cached, whatever for.";
    LAYER_FETCHED = "soci_layer_fetched_bytes_total" Counter ["layer", "class"]
        "Compressed bytes of a mounted layer that came from a registry or from local content, by what for.";
    VERDICTS = "soci_pull_verdicts_total" Counter ["verdict", "reason"]
        "Pulls, by what became of them and the weightiest reason.";
    LOOKUPS = "soci_auth_lookups_total" Counter ["option", "outcome"]
        "Lookups of registry logins, by option and outcome.";
    GRANTS = "soci_auth_grants_total" Counter ["outcome"]
        "Grants asked of registries' authorization services.";
    REJECTIONS = "soci_auth_rejections_total" Counter ["option"]
        "Credentials that a registry or its authorization service refused, by the option they came from.";
    DENIALS = "soci_auth_denials_total" Counter ["option", "reason"]
        "Requests that got no further for lack of access, by the option that was asked last and the reason.";
    HELPERS = "soci_auth_helper_duration_milliseconds" Histogram ["outcome"]
        "Runs of credential helpers, in milliseconds.";
    PULLS = "soci_cri_credential_references" Gauge []
        "Image references with a credential from the kubelet's pulls.";
    CALLS = "soci_cri_calls_total" Counter ["method", "code"]
        "Image calls that were forwarded to containerd, by gRPC code.";
    CALL_TIME = "soci_cri_call_duration_microseconds" Histogram ["method"]
        "Image calls from first byte to last, containerd's share included, in microseconds.";
    CALLS_IN_FLIGHT = "soci_cri_calls_in_flight" Gauge []
        "Image calls under way.";
    SECRETS = "soci_kubernetes_secrets" Gauge []
        "Pull secrets that are synced.";
    BEHIND = "soci_kubernetes_seconds_since_sync" Gauge []
        "Seconds since pull secrets were last known to be what the API server has; 0 while they are.";
    REQUESTS = "soci_registry_requests_total" Counter ["operation", "status"]
        "Requests to registries, by class of status.";
    RECEIVED = "soci_registry_received_bytes_total" Counter []
        "Bytes of blobs received from registries.";
    CACHE = "soci_span_cache_bytes" Gauge []
        "Bytes of the span cache on disk.";
    CACHE_LIMIT = "soci_span_cache_limit_bytes" Gauge []
        "Bytes that the span cache may take; absent when there is no limit.";
    MOUNTS = "soci_mounted_layers" Gauge []
        "Layers mounted and served.";
    IN_FLIGHT = "soci_fetch_bytes_in_flight" Gauge []
        "Bytes of spans being fetched or inflated.";
    RESIDENT = "process_resident_memory_bytes" Gauge []
        "Resident memory in bytes.";
    DESCRIPTORS = "process_open_fds" Gauge []
        "Open file descriptors.";
}
