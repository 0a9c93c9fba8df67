//! Commands and flags. Help texts here are what `soci --help` and `docs/cli.md` say.

use std::ffi::OsString;
use std::path::PathBuf;
use std::time::Duration;

use clap::builder::{StringValueParser, TypedValueParser as _};
use clap::{Args, Parser, Subcommand};
use soci_oci::Platform;

use crate::internal_docs::Document;

/// Returns what `--version` prints after the program's name: version, and revision where the build was told one.
pub(crate) fn version() -> String {
    let revision = option_env!("SOCI_REVISION").unwrap_or("unknown");
    format!("version {} {revision}", env!("CARGO_PKG_VERSION"))
}

/// Build, list and push the indexes by which container images load lazily.
#[derive(Parser)]
#[command(
    name = "soci",
    version = version(),
    disable_version_flag = true,
    args_override_self = true,
    max_term_width = 120
)]
pub(crate) struct Cli {
    #[command(flatten)]
    pub(crate) global: Global,
    /// Print the version
    #[arg(short = 'v', long, action = clap::ArgAction::Version)]
    version: Option<bool>,
    #[command(subcommand)]
    pub(crate) command: Option<Command>,
}

/// Where containerd listens unless another place is given.
pub(crate) const ADDRESS: &str = "/run/containerd/containerd.sock";
const NAMESPACE: &str = "default";

/// Flags of every command, accepted before and after its name.
#[derive(Args)]
pub(crate) struct Global {
    /// containerd's socket
    #[arg(
        short,
        long,
        global = true,
        env = "CONTAINERD_ADDRESS",
        value_parser = or_default(ADDRESS),
        default_value = ADDRESS
    )]
    pub(crate) address: String,
    /// containerd's namespace
    #[arg(
        short,
        long,
        global = true,
        env = "CONTAINERD_NAMESPACE",
        value_parser = or_default(NAMESPACE),
        default_value = NAMESPACE
    )]
    pub(crate) namespace: String,
    /// Limit of the whole command, e.g. 30s or 5m
    #[arg(long, global = true, allow_hyphen_values = true, value_parser = crate::duration::parse)]
    pub(crate) timeout: Option<Duration>,
    /// Log what is done to stderr
    #[arg(long, global = true)]
    pub(crate) debug: bool,
    /// Where SOCI artifacts are kept: soci or containerd
    #[arg(long, global = true, default_value = "containerd")]
    pub(crate) content_store: String,
    /// Directory of the soci content store
    #[arg(long, global = true, default_value = "/var/lib/soci-snapshotter-grpc/")]
    pub(crate) root: PathBuf,
}

#[derive(Subcommand)]
pub(crate) enum Command {
    /// Create a SOCI index (v1) for a local image
    Create(Create),
    /// Convert an image into a SOCI-enabled image (index v2)
    Convert(Convert),
    /// Push SOCI artifacts (v1) of an image to its registry
    Push(Push),
    /// Check the content store; kept for scripts: there is no database to rebuild
    #[command(name = "rebuild-db", alias = "rebuild_db")]
    RebuildDb,
    /// Manage indexes
    #[command(subcommand)]
    Index(Index),
    /// Look into registry logins
    #[command(subcommand)]
    Auth(Auth),
    /// Look into zTOCs
    #[command(subcommand)]
    Ztoc(Ztoc),
    /// Look into prefetch artifacts
    #[command(subcommand)]
    Prefetch(Prefetch),
    /// Print the version
    Version,
    /// Documents that the program writes about itself
    #[command(subcommand, hide = true)]
    InternalDocs(Document),
}

/// Which platforms are meant.
#[derive(Args)]
pub(crate) struct PlatformFlags {
    /// All platforms of the image
    #[arg(long)]
    pub(crate) all_platforms: bool,
    /// A platform, e.g. linux/amd64; may be repeated
    #[arg(short, long, value_delimiter = ',', value_parser = platform)]
    pub(crate) platform: Vec<Platform>,
}

/// How zTOCs are built.
#[derive(Args)]
pub(crate) struct ZtocFlags {
    /// Bytes of uncompressed data per span
    #[arg(long, default_value_t = 4 << 20, allow_negative_numbers = true, value_parser = number)]
    pub(crate) span_size: i64,
    /// Layers strictly smaller than this many bytes get no zTOC
    #[arg(long, default_value_t = 10 << 20, allow_negative_numbers = true, value_parser = number)]
    pub(crate) min_layer_size: i64,
    /// Optional optimization: xattr; may be repeated
    #[arg(long, value_delimiter = ',')]
    pub(crate) optimizations: Vec<String>,
    /// Build zTOCs even if they exist
    #[arg(short, long)]
    pub(crate) force: bool,
    /// Path of a file inside the image that is to be prefetched; may be repeated
    #[arg(long, value_delimiter = ',')]
    pub(crate) prefetch_file: Vec<String>,
    /// File with a JSON array of paths to prefetch
    #[arg(long)]
    pub(crate) prefetch_files_json: Option<PathBuf>,
}

#[derive(Args)]
pub(crate) struct Create {
    #[command(flatten)]
    pub(crate) platforms: PlatformFlags,
    #[command(flatten)]
    pub(crate) ztoc: ZtocFlags,
    /// The image, as containerd names it
    #[arg(value_name = "IMAGE_REF")]
    pub(crate) image: Option<String>,
}

#[derive(Args)]
pub(crate) struct Convert {
    #[command(flatten)]
    pub(crate) platforms: PlatformFlags,
    #[command(flatten)]
    pub(crate) ztoc: ZtocFlags,
    /// Convert an OCI image layout on disk, without containerd
    #[arg(long)]
    pub(crate) standalone: bool,
    /// What --standalone writes: oci-archive (a tar) or oci-dir
    #[arg(long, default_value = "oci-archive", value_parser = format)]
    pub(crate) format: soci_index::standalone::Format,
    /// The image to convert, or with --standalone the layout to read: a directory or a tar
    #[arg(value_name = "SOURCE")]
    pub(crate) source: Option<OsString>,
    /// The new image, or with --standalone the layout to write
    #[arg(value_name = "DESTINATION")]
    pub(crate) destination: Option<OsString>,
}

/// How a registry is reached and logged in to.
// No `Debug`: it holds a password.
#[derive(Args)]
pub(crate) struct RegistryFlags {
    /// USERNAME:PASSWORD for the image's registry. Others see it in the process list and it stays in the shell's history:
    /// prefer USERNAME with --password-stdin, or a Docker config
    #[arg(short, long, value_name = "USERNAME[:PASSWORD]", allow_hyphen_values = true)]
    pub(crate) user: Option<OsString>,
    /// Read the password from standard input
    #[arg(long, requires = "user")]
    pub(crate) password_stdin: bool,
    /// Use plain http
    #[arg(long)]
    pub(crate) plain_http: bool,
    /// Check no certificate: the registry's, nor those of the token server and storage to which it leads
    #[arg(short = 'k', long)]
    pub(crate) skip_verify: bool,
    /// Directory with hosts.toml files, in place of /etc/containerd/certs.d; may be repeated
    #[arg(long, value_delimiter = ',')]
    pub(crate) hosts_dir: Vec<PathBuf>,
    /// PEM file of an authority to trust beside the system's
    #[arg(long)]
    pub(crate) tlscacert: Option<PathBuf>,
    /// PEM file of a client certificate
    #[arg(long, requires = "tlskey")]
    pub(crate) tlscert: Option<PathBuf>,
    /// PEM file of the client certificate's key
    #[arg(long, requires = "tlscert")]
    pub(crate) tlskey: Option<PathBuf>,
}

#[derive(Args)]
pub(crate) struct Push {
    #[command(flatten)]
    pub(crate) platforms: PlatformFlags,
    #[command(flatten)]
    pub(crate) registry: RegistryFlags,
    /// What to do if the registry has an index of the image: warn, skip or allow
    #[arg(long, default_value = "warn")]
    pub(crate) existing_index: String,
    /// Uploads at a time; 0 is the default
    #[arg(long, default_value_t = 3, allow_negative_numbers = true)]
    pub(crate) max_concurrent_uploads: u64,
    /// Print only the digest of the index
    #[arg(short, long)]
    pub(crate) quiet: bool,
    /// Log requests to stderr, without headers and bodies
    #[arg(long)]
    pub(crate) http_dump: bool,
    /// Log requests to stderr, without headers and bodies
    #[arg(long)]
    pub(crate) http_trace: bool,
    /// No effect; accepted for scripts
    #[arg(long, hide = true)]
    pub(crate) refresh: Option<String>,
    /// No effect; accepted for scripts
    #[arg(long, hide = true, env = "CONTAINERD_SNAPSHOTTER")]
    pub(crate) snapshotter: Option<String>,
    /// The image whose artifacts are pushed
    #[arg(value_name = "REF")]
    pub(crate) image: Option<String>,
}

impl Push {
    /// Whether requests are to be logged.
    pub(crate) fn dumps(&self) -> bool {
        self.http_dump || self.http_trace
    }
}

#[derive(Subcommand)]
pub(crate) enum Auth {
    /// Show which credential an image would be fetched with, where it comes from, and why not another; never a secret
    Explain(AuthExplain),
}

#[derive(Args)]
pub(crate) struct AuthExplain {
    #[command(flatten)]
    pub(crate) registry: RegistryFlags,
    /// Ask the running daemon: what it has, instead of what this command has
    #[arg(long, conflicts_with_all = ["user", "plain_http", "skip_verify", "hosts_dir", "tlscacert", "tlscert"])]
    pub(crate) daemon: bool,
    /// The daemon's control socket
    #[arg(long, value_name = "PATH", default_value = "/run/soci-snapshotter-grpc/control.sock")]
    pub(crate) control: PathBuf,
    /// Ask the registry for the image, and say what it answers
    #[arg(long)]
    pub(crate) check: bool,
    /// Print JSON
    #[arg(long)]
    pub(crate) json: bool,
    /// The image
    #[arg(value_name = "REF")]
    pub(crate) image: Option<String>,
}

#[derive(Subcommand)]
pub(crate) enum Index {
    /// List indexes
    #[command(visible_alias = "ls")]
    List(IndexList),
    /// Print an index
    Info(DigestArg),
    /// Remove indexes
    #[command(name = "remove", visible_alias = "rm")]
    Remove(IndexRemove),
}

#[derive(Args)]
pub(crate) struct IndexList {
    /// Only indexes of this image
    #[arg(long = "ref", value_name = "REF")]
    pub(crate) reference: Option<String>,
    /// Only this platform; may be repeated
    #[arg(short, long, value_delimiter = ',', value_parser = platform)]
    pub(crate) platform: Vec<Platform>,
    /// Print digests only
    #[arg(short, long)]
    pub(crate) quiet: bool,
    /// Print JSON
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Args)]
pub(crate) struct IndexRemove {
    /// Remove all indexes of this image
    #[arg(long = "ref", value_name = "REF")]
    pub(crate) reference: Option<String>,
    /// Indexes to remove
    pub(crate) digests: Vec<String>,
}

/// The digest that an `info` command is given.
#[derive(Args)]
pub(crate) struct DigestArg {
    /// Digest of what to print
    #[arg(value_name = "DIGEST", default_value = "", hide_default_value = true)]
    pub(crate) digest: String,
}

#[derive(Subcommand)]
pub(crate) enum Ztoc {
    /// List zTOCs
    #[command(visible_alias = "ls")]
    List(ZtocList),
    /// Print what a zTOC says
    Info(DigestArg),
    /// Extract a file from a local layer by its zTOC
    GetFile(GetFile),
}

#[derive(Args)]
pub(crate) struct ZtocList {
    /// Only this zTOC
    #[arg(long)]
    pub(crate) ztoc_digest: Option<String>,
    /// Only zTOCs of this image
    #[arg(long)]
    pub(crate) image_ref: Option<String>,
    /// Print digests only
    #[arg(short, long)]
    pub(crate) quiet: bool,
    /// Print JSON
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Args)]
pub(crate) struct GetFile {
    /// Write here instead of to standard output
    #[arg(short, long)]
    pub(crate) output: Option<PathBuf>,
    /// Digest of the zTOC
    pub(crate) digest: Option<String>,
    /// Name of the file in the layer
    pub(crate) file: Option<OsString>,
}

#[derive(Subcommand)]
pub(crate) enum Prefetch {
    /// List prefetch artifacts
    #[command(visible_alias = "ls")]
    List(PrefetchList),
    /// Print a prefetch artifact
    Info(PrefetchInfo),
}

#[derive(Args)]
pub(crate) struct PrefetchList {
    /// Print JSON
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Args)]
pub(crate) struct PrefetchInfo {
    /// Also print the artifact itself
    #[arg(long)]
    pub(crate) json: bool,
    #[command(flatten)]
    pub(crate) digest: DigestArg,
}

/// Takes any text; an empty one, as of a variable that is set to nothing, is the default.
fn or_default(default: &'static str) -> impl clap::builder::TypedValueParser<Value = String> {
    StringValueParser::new().map(move |text| if text.is_empty() { default.to_owned() } else { text })
}

/// Parses a number as Go does where it expects one: `4096`, `4_096`, `0x1000`.
fn number(text: &str) -> Result<i64, std::num::ParseIntError> {
    let digits = text.to_ascii_lowercase().replace('_', "");
    let radixes = [("0x", 16), ("0b", 2), ("0o", 8)];
    let radix = radixes.iter().find_map(|(prefix, radix)| Some((digits.strip_prefix(prefix)?, *radix)));
    let (digits, radix) = radix.unwrap_or((&digits, 10));
    i64::from_str_radix(digits, radix)
}

fn platform(text: &str) -> Result<Platform, soci_oci::platform::PlatformError> {
    text.parse()
}

fn format(text: &str) -> Result<soci_index::standalone::Format, String> {
    match text {
        "oci-archive" => Ok(soci_index::standalone::Format::OciArchive),
        "oci-dir" => Ok(soci_index::standalone::Format::OciDir),
        other => Err(format!("unsupported output format {other:?}: must be \"oci-archive\" or \"oci-dir\"")),
    }
}
