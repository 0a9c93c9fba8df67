//! Why a tar cannot be read.

/// A tar that cannot be read, and where.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("tar at byte {at}: {fault}")]
pub struct TarError {
    /// Position in the uncompressed tar: of the header block in question, or where the input ended.
    pub at: u64,
    /// What is wrong there.
    pub fault: TarFault,
}

/// What is wrong with a tar.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum TarFault {
    /// The checksum does not fit: no tar header at all.
    #[error("not a tar header (checksum mismatch)")]
    Checksum,
    /// A number field holds no number, or one past 64 bits.
    #[error("the header's {0} field is no number")]
    Number(&'static str),
    /// The size is negative.
    #[error("the size is negative")]
    NegativeSize,
    /// A PAX extension header is malformed.
    #[error("malformed pax extension header")]
    Pax,
    /// An extension header is larger than [`MAX_EXTENSION`](super::MAX_EXTENSION).
    #[error("extension header of {size} bytes is larger than {limit} bytes")]
    ExtensionSize {
        /// Its size.
        size: u64,
        /// The largest allowed.
        limit: u64,
    },
    /// The headers of one member are larger than [`MAX_GROUP`](super::MAX_GROUP).
    #[error("the headers of one member are larger than {limit} bytes")]
    GroupSize {
        /// The largest allowed.
        limit: u64,
    },
    /// One block of zeros is followed by something else.
    #[error("a single block of zeros is followed by a header")]
    ZeroBlock,
    /// A sparse file: its data are not stored as they are read, so offsets into it mean nothing.
    #[error("sparse files are not supported")]
    Sparse,
    /// A member of a kind no file system has.
    #[error("unsupported tar entry type {:?}", char::from(*.0))]
    Kind(u8),
    /// The input ended inside a header or inside a member's data.
    #[error("the tar ends in the middle of a member")]
    Truncated,
    /// The bytes given as one member's headers hold less or more than that.
    #[error("the bytes are not exactly the headers of one member")]
    NotOneMember,
}
