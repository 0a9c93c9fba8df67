//! Every key of the configuration file, as written there.
//!
//! Names, types and defaults are the Go daemon's, so that its file loads here. Zero or less means "the default" for
//! durations and counts, as there; [`super::checked`] turns this into values that cannot be wrong.

use std::collections::BTreeMap;

use super::schema::Support::{Unused, Used};
use super::schema::tables;

const IN_MEMORY: &str = "layer metadata is built from zTOCs in memory; there is no metadata database";
const BY_USE: &str = "a layer's location is refreshed when a request for it is refused";
const ON_DISK: &str = "spans are cached by content under the root directory, with their own bookkeeping";
const NO_CLOCK: &str = "background fetching yields to readers instead of following a clock or a queue";
const NO_PARALLEL: &str =
    "an image without SOCI index is left to containerd, which pulls it as it is configured to";

tables! {
    /// The whole file.
    Raw {
        /// Had an effect never.
        "http_cache_type" http_cache_type: String = String::new(), Unused("it never had an effect");
        /// Where spans are cached.
        "filesystem_cache_type" filesystem_cache_type: String = String::new(), Unused(ON_DISK);
        /// Size of the layer cache.
        "resolve_result_entry" resolve_result_entry: i64 = 0, Unused("layers live as long as their mounts, whatever their number");
        /// Protocol tracing of the layer file systems.
        "debug" debug: bool = false, Unused("use --log-level trace");
        /// Whether tar headers are not compared with the zTOC when a file is first read.
        "disable_verification" disable_verification: bool = false, Used;
        /// How many layers of an image are prepared ahead at once.
        "max_concurrency" max_concurrency: i64 = 100, Unused("the artifacts of an image are fetched in one burst with a limit of its own");
        /// Seconds within which an image's index must be found, and then each layer be mounted.
        "mount_timeout_sec" mount_timeout_sec: i64 = 30, Used;
        /// Seconds after which operations of an image are counted into the log.
        "fuse_metrics_emit_wait_duration_sec" fuse_metrics_emit_wait_duration_sec: i64 = 60, Unused("operations are counted without pause");
        /// Where metrics are served: `host:port`, `:port` for all addresses, or a path with `metrics_network = "unix"`. Empty for nowhere. An address that cannot be had is warned about once and tried again until it can.
        "metrics_address" metrics_address: String = String::new(), Used;
        /// `tcp`, `tcp4` or `tcp6` for addresses of that kind alone, or `unix`.
        "metrics_network" metrics_network: String = "tcp".to_owned(), Used;
        /// Whether no metrics are served.
        "no_prometheus" no_prometheus: bool = false, Used;
        /// Unix socket on which the daemon's state is served as JSON (`GET /debug/state`). Empty for none; other addresses are not listened on.
        "debug_address" debug_address: String = String::new(), Used;
        /// Kind of metadata database: `db` or `db-multi`.
        "metadata_store" metadata_store: String = "db".to_owned(), Unused(IN_MEMORY);
        /// Whether that database is not synced.
        "metadata_db_no_sync" metadata_db_no_sync: bool = false, Unused(IN_MEMORY);
        /// How many entries are inserted into it at once.
        "metadata_insertion_chunk_size" metadata_insertion_chunk_size: i64 = 0, Unused(IN_MEMORY);
        /// Whether overlay is not tried out at start.
        "skip_check_snapshotter_supported" skip_check_snapshotter_supported: bool = false, Used;
        /// Requests to registries.
        "http" http: Http = Http::default(), Used;
        /// Requests for parts of layers.
        "blob" blob: Blob = Blob::default(), Used;
        /// The span cache of the Go daemon.
        "directory_cache" directory_cache: DirectoryCache = DirectoryCache::default(), Used;
        /// The span cache.
        "span_cache" span_cache: SpanCache = SpanCache::default(), Used;
        /// Layer file systems.
        "fuse" fuse: Fuse = Fuse::default(), Used;
        /// Completing layers in the background.
        "background_fetch" background_fetch: BackgroundFetch = BackgroundFetch::default(), Used;
        /// Where SOCI artifacts are looked for before the registry.
        "content_store" content_store: ContentStore = ContentStore::default(), Used;
        /// Prefetch artifacts.
        "prefetch" prefetch: Prefetch = Prefetch::default(), Used;
        /// How images are pulled.
        "pull_modes" pull_modes: PullModes = PullModes::default(), Used;
        /// Registry logins from Kubernetes secrets.
        "kubeconfig_keychain" kubeconfig_keychain: KubeconfigKeychain = KubeconfigKeychain::default(), Used;
        /// Registry logins from the kubelet's pulls.
        "cri_keychain" cri_keychain: CriKeychain = CriKeychain::default(), Used;
        /// Registry hosts.
        "resolver" resolver: Resolver = Resolver::default(), Used;
        /// Snapshots.
        "snapshotter" snapshotter: Snapshotter = Snapshotter::default(), Used;
    }

    /// `[http]`
    Http {
        /// Milliseconds to connect.
        "DialTimeoutMsec" dial_timeout_msec: i64 = 3000, Used;
        /// Milliseconds until the headers of an answer.
        "ResponseHeaderTimeoutMsec" response_header_timeout_msec: i64 = 3000, Used;
        /// Milliseconds for a whole request.
        "RequestTimeoutMsec" request_timeout_msec: i64 = 300_000, Used;
        /// Attempts after the first; negative for none.
        "MaxRetries" max_retries: i64 = 8, Used;
        /// Shortest pause between attempts in milliseconds.
        "MinWaitMsec" min_wait_msec: i64 = 30, Used;
        /// Longest pause between attempts in milliseconds.
        "MaxWaitMsec" max_wait_msec: i64 = 300_000, Used;
    }

    /// `[blob]`
    Blob {
        /// Seconds after which a location is checked.
        "valid_interval" valid_interval: i64 = 60, Unused(BY_USE);
        /// Seconds after which a read fails.
        "fetching_timeout_sec" fetching_timeout_sec: i64 = 300, Used;
        /// Attempts after the first, negative for none; as `[http]` has it, if absent.
        "max_retries" max_retries: Option<i64> = None, Used;
        /// Shortest pause in milliseconds; as `[http]` has it, if absent.
        "min_wait_msec" min_wait_msec: Option<i64> = None, Used;
        /// Longest pause in milliseconds; as `[http]` has it, if absent.
        "max_wait_msec" max_wait_msec: Option<i64> = None, Used;
        /// Whether each use checks the location.
        "check_always" check_always: bool = false, Unused(BY_USE);
        /// Whether a request asks for one range.
        "force_single_range_mode" force_single_range_mode: bool = false, Unused("each request asks for one range");
        /// How often a span with a wrong digest is fetched again.
        "max_span_verification_retries" max_span_verification_retries: i64 = 0, Unused("a span with a wrong digest is fetched once more, then the read fails and the next one tries again");
    }

    /// `[directory_cache]`
    DirectoryCache {
        /// Entries in memory.
        "max_lru_cache_entry" max_lru_cache_entry: i64 = 0, Unused(ON_DISK);
        /// Open files.
        "max_cache_fds" max_cache_fds: i64 = 0, Unused(ON_DISK);
        /// Whether adding waits for the disk.
        "sync_add" sync_add: bool = false, Unused(ON_DISK);
        /// Whether the memory is bypassed.
        "direct" direct: bool = true, Unused(ON_DISK);
    }

    /// `[span_cache]`
    SpanCache {
        /// Bytes that cached parts of layers may take on disk. At the limit what was not used for longest goes, and is fetched again when it is needed. 0 for `max_percent` alone, negative for no limit at all.
        "max_bytes" max_bytes: i64 = 0, Used;
        /// The same limit in percent of the space that is free or the cache's own when the daemon starts. The smaller one holds.
        "max_percent" max_percent: i64 = 75, Used;
    }

    /// `[fuse]`
    Fuse {
        /// Seconds for which the kernel keeps attributes; layers never change, so the default is long.
        "attr_timeout" attr_timeout: i64 = 1, Unused("a layer never changes, so the kernel keeps what it knows");
        /// Seconds for which the kernel keeps names.
        "entry_timeout" entry_timeout: i64 = 1, Unused("a layer never changes, so the kernel keeps what it knows");
        /// Seconds for which the kernel keeps that a name does not exist.
        "negative_timeout" negative_timeout: i64 = 1, Unused("a layer never changes, so the kernel keeps what it knows");
        /// Whether each operation is logged with its path.
        "log_fuse_operations" log_fuse_operations: bool = false, Unused("use --log-level trace");
    }

    /// `[background_fetch]`
    BackgroundFetch {
        /// Whether layers are not completed in the background.
        "disable" disable: bool = false, Used;
        /// Bytes per second that completing layers may take; 0 for as fast as it goes. Readers are never slowed.
        "max_bytes_per_second" max_bytes_per_second: i64 = 0, Used;
        /// Milliseconds of pause after a new image.
        "silence_period_msec" silence_period_msec: i64 = 30_000, Unused(NO_CLOCK);
        /// Milliseconds per span.
        "fetch_period_msec" fetch_period_msec: i64 = 500, Unused(NO_CLOCK);
        /// Layers waiting.
        "max_queue_size" max_queue_size: i64 = 300, Unused(NO_CLOCK);
        /// Which layer goes when too many wait: `newest` or `oldest`.
        "drop_policy" drop_policy: String = "newest".to_owned(), Unused(NO_CLOCK);
        /// Seconds between two metrics of the queue.
        "emit_metric_period_sec" emit_metric_period_sec: i64 = 10, Unused("the metric is always current");
    }

    /// `[content_store]`
    ContentStore {
        /// `soci` or `containerd`. Both are read whatever it says, containerd's store before the one under the root directory; what the daemon fetches is kept under its root.
        "type" kind: String = "soci".to_owned(), Used;
        /// containerd's socket.
        "containerd_address" containerd_address: String = "/run/containerd/containerd.sock".to_owned(), Used;
    }

    /// `[prefetch]`
    Prefetch {
        /// Whether prefetch artifacts are honoured.
        "enable" enable: bool = false, Used;
        /// How many layers prefetch at once.
        "max_concurrency" max_concurrency: i64 = 0, Unused("prefetching shares the limits of background work");
    }

    /// `[pull_modes]`
    PullModes {
        /// Whether a pull that is not lazy fails instead of falling back.
        "strict" strict: bool = false, Used;
        /// SOCI index v1.
        "soci_v1" soci_v1: SociV1 = SociV1::default(), Used;
        /// SOCI index v2.
        "soci_v2" soci_v2: SociV2 = SociV2::default(), Used;
        /// Unpacking whole images.
        "parallel_pull_unpack" parallel_pull_unpack: Parallel = Parallel::default(), Used;
    }

    /// `[pull_modes.soci_v1]`
    SociV1 {
        /// Whether an index is looked for among the image's referrers.
        "enable" enable: bool = false, Used;
    }

    /// `[pull_modes.soci_v2]`
    SociV2 {
        /// Whether an index is looked for in the manifest's annotations.
        "enable" enable: bool = true, Used;
    }

    /// `[pull_modes.parallel_pull_unpack]`
    Parallel {
        /// Requests at once.
        "max_concurrent_downloads" max_concurrent_downloads: i64 = -1, Unused(NO_PARALLEL);
        /// Requests at once for one image.
        "max_concurrent_downloads_per_image" max_concurrent_downloads_per_image: i64 = 3, Unused(NO_PARALLEL);
        /// Size of one request.
        "concurrent_download_chunk_size" concurrent_download_chunk_size: String = String::new(), Unused(NO_PARALLEL);
        /// Layers unpacked at once.
        "max_concurrent_unpacks" max_concurrent_unpacks: i64 = -1, Unused(NO_PARALLEL);
        /// Layers of one image unpacked at once.
        "max_concurrent_unpacks_per_image" max_concurrent_unpacks_per_image: i64 = 1, Unused(NO_PARALLEL);
        /// Whether blobs are not kept.
        "discard_unpacked_layers" discard_unpacked_layers: bool = false, Unused(NO_PARALLEL);
        /// Whether every image is unpacked this way.
        "enable" enable: bool = false, Unused(NO_PARALLEL);
        /// Whether images without index are.
        "experimental_parallel_pull_as_fallback" experimental_parallel_pull_as_fallback: bool = false, Unused(NO_PARALLEL);
        /// Programs that decompress, by algorithm.
        "decompress_streams" decompress_streams: BTreeMap<String, Decompressor> = BTreeMap::new(), Unused(NO_PARALLEL);
    }

    /// `[pull_modes.parallel_pull_unpack.decompress_streams.<algorithm>]`
    Decompressor {
        /// The program.
        "path" path: String = String::new(), Unused(NO_PARALLEL);
        /// Its arguments.
        "args" args: Vec<String> = Vec::new(), Unused(NO_PARALLEL);
    }

    /// `[kubeconfig_keychain]`
    KubeconfigKeychain {
        /// Whether it is asked.
        "enable_keychain" enable_keychain: bool = false, Used;
        /// Where the kubeconfig is.
        "kubeconfig_path" kubeconfig_path: String = String::new(), Used;
        /// Of which namespaces secrets are synced; none for all.
        "namespaces" namespaces: Vec<String> = Vec::new(), Used;
        /// Whether secrets of the older type `kubernetes.io/dockercfg` are synced too.
        "legacy_dockercfg" legacy_dockercfg: bool = false, Used;
    }

    /// `[cri_keychain]`
    CriKeychain {
        /// Whether it is asked, and the image service served.
        "enable_keychain" enable_keychain: bool = false, Used;
        /// Where containerd's image service is.
        "image_service_path" image_service_path: String = "/run/containerd/containerd.sock".to_owned(), Used;
    }

    /// `[resolver]`
    Resolver {
        /// Seconds for which clients are kept.
        "auth_client_ttl_sec" auth_client_ttl_sec: i64 = 3600, Unused("connections are shared and what a registry grants is kept for as long as it is valid");
        /// Whether images share clients.
        "enable_auth_client_sharing" enable_auth_client_sharing: bool = false, Unused("images always share connections and grants");
        /// Directory of containerd's per-host configuration (`hosts.toml`); empty for none.
        "config_path" config_path: String = "/etc/containerd/certs.d".to_owned(), Used;
        /// Mirrors, by the host that images name.
        "host" host: BTreeMap<String, Host> = BTreeMap::new(), Used;
    }

    /// `[resolver.host."<host>"]`
    Host {
        /// Mirrors, asked in order before the host itself.
        "mirrors" mirrors: Vec<Mirror> = Vec::new(), Used;
    }

    /// `[[resolver.host."<host>".mirrors]]`
    Mirror {
        /// Host with an optional scheme, port and path.
        "host" host: String = String::new(), Used;
        /// Whether it is spoken to without TLS.
        "insecure" insecure: bool = false, Used;
        /// Seconds for a request; 0 as `[http]` has it, negative without limit.
        "request_timeout_sec" request_timeout_sec: i64 = 0, Used;
        /// Whether the logins of the registry that pulls bring (`[cri_keychain]`) are sent to it too. Docker config and secrets are looked up by the mirror's own name, whatever this says.
        "forward_credentials" forward_credentials: bool = false, Used;
    }

    /// `[snapshotter]`
    Snapshotter {
        /// Layers smaller than this many bytes are unpacked.
        "min_layer_size" min_layer_size: i64 = 0, Used;
        /// Whether a start survives mounts that cannot be restored.
        "allow_invalid_mounts_on_restart" allow_invalid_mounts_on_restart: bool = false, Unused("a start never fails because of a mount; it is restored when it can be");
    }
}
