//! Checked access to tables, vectors and byte strings of a FlatBuffer.

/// The buffer breaks a rule of FlatBuffers at this byte.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("not a valid flatbuffer at byte {at}")]
pub struct WireFault {
    /// Where in the buffer.
    pub at: usize,
}

/// Reads `N` bytes at `at`.
fn array<const N: usize>(buf: &[u8], at: usize) -> Result<[u8; N], WireFault> {
    let end = at.checked_add(N).ok_or(WireFault { at })?;
    let bytes = buf.get(at..end).ok_or(WireFault { at })?;
    bytes.try_into().map_err(|_| WireFault { at })
}

fn u16_at(buf: &[u8], at: usize) -> Result<usize, WireFault> {
    Ok(usize::from(u16::from_le_bytes(array(buf, at)?)))
}

fn u32_at(buf: &[u8], at: usize) -> Result<usize, WireFault> {
    usize::try_from(u32::from_le_bytes(array(buf, at)?)).map_err(|_| WireFault { at })
}

/// Follows the unsigned offset stored at `at`.
fn follow(buf: &[u8], at: usize) -> Result<usize, WireFault> {
    at.checked_add(u32_at(buf, at)?).filter(|target| *target < buf.len()).ok_or(WireFault { at })
}

/// One table; copying it copies three words.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Table<'a> {
    buf: &'a [u8],
    at: usize,
    vtable: &'a [u8],
}

impl<'a> Table<'a> {
    /// The root table of a buffer without size prefix.
    pub(crate) fn root(buf: &'a [u8]) -> Result<Self, WireFault> {
        Self::new(buf, follow(buf, 0)?)
    }

    fn new(buf: &'a [u8], at: usize) -> Result<Self, WireFault> {
        let fault = WireFault { at };
        let back = i64::from(i32::from_le_bytes(array(buf, at)?));
        let vtable = i64::try_from(at).ok().and_then(|at| at.checked_sub(back)).ok_or(fault)?;
        let vtable = usize::try_from(vtable).map_err(|_| fault)?;
        let len = u16_at(buf, vtable)?;
        if len < 4 {
            return Err(fault);
        }
        let end = vtable.checked_add(len).ok_or(fault)?;
        let vtable = buf.get(vtable..end).ok_or(fault)?;
        Ok(Self { buf, at, vtable })
    }

    /// Position of a field, or `None` when the table leaves it at its default.
    fn field(&self, slot: usize) -> Result<Option<usize>, WireFault> {
        let Some(entry) = self.vtable.get(4 + 2 * slot..6 + 2 * slot) else { return Ok(None) };
        let offset = usize::from(u16::from_le_bytes([entry[0], entry[1]]));
        match offset {
            0 => Ok(None),
            // The first four bytes of a table are its vtable offset.
            1..=3 => Err(WireFault { at: self.at }),
            _ => self.at.checked_add(offset).map(Some).ok_or(WireFault { at: self.at }),
        }
    }

    pub(crate) fn i8(&self, slot: usize, default: i8) -> Result<i8, WireFault> {
        self.field(slot)?.map_or(Ok(default), |at| array(self.buf, at).map(i8::from_le_bytes))
    }

    pub(crate) fn i32(&self, slot: usize) -> Result<i32, WireFault> {
        self.field(slot)?.map_or(Ok(0), |at| array(self.buf, at).map(i32::from_le_bytes))
    }

    pub(crate) fn u32(&self, slot: usize) -> Result<u32, WireFault> {
        self.field(slot)?.map_or(Ok(0), |at| array(self.buf, at).map(u32::from_le_bytes))
    }

    pub(crate) fn i64(&self, slot: usize) -> Result<i64, WireFault> {
        self.field(slot)?.map_or(Ok(0), |at| array(self.buf, at).map(i64::from_le_bytes))
    }

    /// A string or byte vector: where its bytes begin, and the bytes.
    pub(crate) fn located(&self, slot: usize) -> Result<Option<(usize, &'a [u8])>, WireFault> {
        let Some(at) = self.field(slot)? else { return Ok(None) };
        located(self.buf, at).map(Some)
    }

    /// A string or byte vector.
    pub(crate) fn bytes(&self, slot: usize) -> Result<Option<&'a [u8]>, WireFault> {
        Ok(self.located(slot)?.map(|(_, bytes)| bytes))
    }

    pub(crate) fn table(&self, slot: usize) -> Result<Option<Table<'a>>, WireFault> {
        let Some(at) = self.field(slot)? else { return Ok(None) };
        Table::new(self.buf, follow(self.buf, at)?).map(Some)
    }

    /// A vector of tables or strings; absent is empty.
    pub(crate) fn tables(&self, slot: usize) -> Result<Tables<'a>, WireFault> {
        let Some(field) = self.field(slot)? else { return Ok(Tables { buf: self.buf, at: 0, len: 0 }) };
        let at = follow(self.buf, field)?;
        let len = u32_at(self.buf, at)?;
        let end = len.checked_mul(4).and_then(|size| size.checked_add(at)?.checked_add(4));
        match end {
            Some(end) if end <= self.buf.len() => Ok(Tables { buf: self.buf, at: at + 4, len }),
            _ => Err(WireFault { at }),
        }
    }
}

fn located(buf: &[u8], at: usize) -> Result<(usize, &[u8]), WireFault> {
    let at = follow(buf, at)?;
    let len = u32_at(buf, at)?;
    let begin = at.checked_add(4).ok_or(WireFault { at })?;
    let end = begin.checked_add(len).ok_or(WireFault { at })?;
    Ok((begin, buf.get(begin..end).ok_or(WireFault { at })?))
}

/// A vector of offsets; its extent is inside the buffer, its targets are checked when followed.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Tables<'a> {
    buf: &'a [u8],
    at: usize,
    len: usize,
}

impl<'a> Tables<'a> {
    pub(crate) fn len(&self) -> usize {
        self.len
    }

    fn slot(&self, index: usize) -> Result<usize, WireFault> {
        if index < self.len { Ok(self.at + 4 * index) } else { Err(WireFault { at: self.at }) }
    }

    /// Element `index` as a table.
    pub(crate) fn get(&self, index: usize) -> Result<Table<'a>, WireFault> {
        Table::new(self.buf, follow(self.buf, self.slot(index)?)?)
    }

    /// Element `index` as a byte string.
    pub(crate) fn bytes(&self, index: usize) -> Result<&'a [u8], WireFault> {
        Ok(located(self.buf, self.slot(index)?)?.1)
    }
}
