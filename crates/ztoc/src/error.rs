//! Why a zTOC is refused.

use crate::offset::SpanId;
use crate::wire::WireFault;
use crate::zinfo::ZinfoFault;

/// A zTOC that is refused: damaged, hostile, or of a form we do not know.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ZtocError {
    /// It exceeds a limit of [`DecodeLimits`](crate::DecodeLimits).
    #[error("ztoc has {got} {what}, more than the limit of {limit}")]
    Limit {
        /// What there is too much of, with its unit.
        what: &'static str,
        /// How much there is.
        got: u64,
        /// How much there may be.
        limit: u64,
    },
    /// It is no FlatBuffer.
    #[error("cannot unmarshal ztoc: {0}")]
    Wire(#[from] WireFault),
    /// A part is missing.
    #[error("ztoc has no {0}")]
    Missing(&'static str),
    /// A text that must be readable is not UTF-8.
    #[error("ztoc {0} is not UTF-8")]
    Text(&'static str),
    /// A size is negative.
    #[error("ztoc {what} is {value}")]
    Negative {
        /// Which size.
        what: &'static str,
        /// Its value.
        value: i64,
    },
    /// A compression that nobody has specified.
    #[error("ztoc compression {0} is not known")]
    Compression(i8),
    /// The zinfo is malformed.
    #[error("ztoc zinfo: {0}")]
    Zinfo(#[from] ZinfoFault),
    /// The number of spans, of digests, and the last id do not agree.
    #[error(
        "given max span ID differs from calculated max span ID: it is {max_span_id}, with {spans} spans and {digests} digests"
    )]
    SpanCount {
        /// The id of the last span as the zTOC gives it.
        max_span_id: i32,
        /// Number of spans by the zinfo.
        spans: usize,
        /// Number of digests.
        digests: usize,
    },
    /// A span digest is not canonical.
    #[error("digest of span {span}: {source}")]
    SpanDigest {
        /// The span.
        span: SpanId,
        /// What is wrong with its digest.
        source: soci_oci::DigestError,
    },
    /// A span's range is empty, reversed, or not inside the layer.
    #[error("span offsets are non-monotonic at span {0}")]
    SpanOrder(SpanId),
    /// A span claims more content than its compressed bytes can hold.
    #[error("span {span} claims {uncompressed} bytes from {compressed} compressed bytes")]
    SpanExpansion {
        /// The span.
        span: SpanId,
        /// Length of its compressed range.
        compressed: u64,
        /// Length of its uncompressed range.
        uncompressed: u64,
    },
    /// An entry breaks a rule.
    #[error("invalid toc entry {index}: {fault}")]
    Entry {
        /// Its position in the zTOC.
        index: usize,
        /// Which rule.
        fault: EntryFault,
    },
}

/// Which rule an entry breaks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum EntryFault {
    /// It is no valid table.
    #[error(transparent)]
    Wire(#[from] WireFault),
    /// Its kind is none of the seven.
    #[error("unknown file type")]
    Kind,
    /// Its offset or size is negative.
    #[error("negative offset or size")]
    Negative,
    /// Its data do not begin on a block.
    #[error("data at {0} do not begin on a block")]
    Alignment(u64),
    /// There is no room for its header after the entry before.
    #[error("data at {data} leave no room for a header at {header}")]
    Order {
        /// Where its header must begin.
        header: u64,
        /// Where its data begin.
        data: u64,
    },
    /// Its headers are larger than any tar reader takes.
    #[error("headers of {0} bytes")]
    HeaderSize(u64),
    /// Its data reach past the archive.
    #[error("data of {size} bytes at {data} reach past the archive")]
    OutOfArchive {
        /// Where its data begin.
        data: u64,
        /// How long they are.
        size: u64,
    },
    /// Its name or link target is too long.
    #[error("name or link of {len} bytes is longer than {limit} bytes")]
    NameLength {
        /// Its length.
        len: usize,
        /// The limit.
        limit: usize,
    },
    /// Its name or link target has a NUL.
    #[error("name or link with a NUL byte")]
    Nul,
    /// Its name climbs out of the layer with `..`.
    #[error("name leaves the root directory")]
    Escape,
    /// A hard link without target, or to itself.
    #[error("hard link to nothing or to itself")]
    HardLink,
    /// The same bytes of the zTOC are used over and over: a small zTOC that unfolds into a huge one.
    #[error("texts are shared too often")]
    Amplification,
}
