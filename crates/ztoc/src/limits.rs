//! How much a zTOC may ask for.

/// Bounds that [`Ztoc::decode`](crate::Ztoc::decode) enforces. zTOCs come from registries: none of their numbers is trusted.
///
/// The defaults fit a layer of about 60 GiB at the usual span size, or a million files, and keep what a hostile zTOC can
/// make us hold proportional to the bytes it is made of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DecodeLimits {
    /// Size of the zTOC.
    pub bytes: usize,
    /// Number of files.
    pub entries: usize,
    /// Length of one name or link target.
    pub name: usize,
    /// Number of spans.
    pub spans: u32,
    /// Uncompressed size of one span, which a reader holds in memory.
    pub span_bytes: u64,
}

impl Default for DecodeLimits {
    fn default() -> Self {
        Self { bytes: 512 << 20, entries: 4 << 20, name: 64 << 10, spans: 1 << 20, span_bytes: 1 << 30 }
    }
}

/// Deflate cannot expand by more: the shortest code for the longest copy is 2 bits for 258 bytes.
pub(crate) const MAX_EXPANSION: u64 = 1032;
