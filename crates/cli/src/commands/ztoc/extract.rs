//! One file out of a layer, by its zTOC: only the spans that hold it are read, and each is verified.

use std::collections::HashMap;
use std::ops::Range;
use std::time::{Duration, Instant};

use anyhow::{Context as _, anyhow, bail};
use futures::StreamExt as _;
use soci_oci::{BlobSource, FetchClass, FetchContext};
use soci_ztoc::{Entry, EntryKind, SpanId, UncompressedOffset, Ztoc, inflate_span};

/// Links that are followed, as Linux does.
const MAX_LINKS: usize = 40;
/// How long reading one span may take.
const READ_LIMIT: Duration = Duration::from_secs(60);

type Path<'a> = Vec<&'a [u8]>;

fn clean(path: &[u8]) -> Path<'_> {
    path.split(|byte| *byte == b'/').filter(|part| !part.is_empty() && *part != b".").collect()
}

/// Returns where in the tar the content of the file `name` is. Links are followed inside the layer.
///
/// # Errors
/// When there is no such file, or it has no content.
pub(super) fn find(ztoc: &Ztoc, name: &[u8]) -> anyhow::Result<Range<UncompressedOffset>> {
    let shown = String::from_utf8_lossy(name).into_owned();
    // The later of two entries of one name wins, as when the layer is unpacked.
    let files: HashMap<Path<'_>, Entry<'_>> =
        ztoc.entries().map(|entry| (clean(entry.name), entry)).collect();
    let mut pending: Vec<Vec<u8>> = clean(name).into_iter().rev().map(<[u8]>::to_vec).collect();
    let mut at: Vec<Vec<u8>> = Vec::new();
    let mut links = 0;
    let mut found: Option<Entry<'_>> = None;
    while let Some(part) = pending.pop() {
        if part == b".." {
            at.pop();
            continue;
        }
        at.push(part);
        let path: Path<'_> = at.iter().map(Vec::as_slice).collect();
        found = files.get(&path).copied();
        let Some(entry) = found.filter(|entry| entry.kind == EntryKind::Symlink) else { continue };
        links += 1;
        if links > MAX_LINKS {
            bail!("file {shown}: more than {MAX_LINKS} links");
        }
        at.pop();
        if entry.link.starts_with(b"/") {
            at.clear();
        }
        pending.extend(clean(entry.link).into_iter().rev().map(<[u8]>::to_vec));
    }
    let mut entry = found.ok_or_else(|| match links {
        0 => anyhow!("file {shown} does not exist in metadata"),
        _ => anyhow!("file {shown} leads by links to {}, which is not in this layer", joined(&at)),
    })?;
    while entry.kind == EntryKind::HardLink {
        links += 1;
        let target = files.get(&clean(entry.link)).filter(|_| links <= MAX_LINKS);
        entry = *target.with_context(|| format!("file {shown}: its link leads nowhere in this layer"))?;
    }
    if entry.kind != EntryKind::Regular {
        bail!("file {shown} is no regular file but: {}", entry.kind.as_str());
    }
    let end = entry.data.0.checked_add(entry.size).context("the file's size is senseless")?;
    Ok(entry.data..UncompressedOffset(end))
}

fn joined(path: &[Vec<u8>]) -> String {
    String::from_utf8_lossy(&path.join(&b'/')).into_owned()
}

/// Writes `range` of the tar, span by span.
///
/// # Errors
/// When the layer cannot be read, or is not what the zTOC says.
pub(super) async fn write(
    ztoc: &Ztoc,
    range: Range<UncompressedOffset>,
    layer: &dyn BlobSource,
    write: &mut dyn FnMut(&[u8]) -> anyhow::Result<()>,
) -> anyhow::Result<()> {
    if range.is_empty() {
        return Ok(());
    }
    for slice in ztoc.spans().covering(range)? {
        let span = span(ztoc, slice.id, layer).await?;
        let part = span.get(slice.part).context("a span is shorter than its zTOC says")?;
        write(part)?;
    }
    Ok(())
}

/// Returns the uncompressed bytes of a span.
async fn span(ztoc: &Ztoc, id: SpanId, layer: &dyn BlobSource) -> anyhow::Result<Vec<u8>> {
    let spans = ztoc.spans();
    let (compressed, uncompressed) = (spans.compressed(id), spans.uncompressed(id));
    let context = FetchContext::new(Instant::now() + READ_LIMIT, FetchClass::OnDemand);
    let mut stream = layer.open(compressed.start.0..compressed.end.0, &context).await?;
    let mut input = Vec::new();
    while let Some(bytes) = stream.next().await {
        input.extend_from_slice(&bytes?);
    }
    if !spans.digest(id).verifies(&input) {
        bail!("span {} of the layer: its bytes do not have the digest that the ztoc names", id.0);
    }
    let at = spans.window(id);
    let window = usize::try_from(at.range.start)
        .ok()
        .zip(usize::try_from(at.range.end).ok())
        .and_then(|(start, end)| ztoc.bytes().get(start..end))
        .context("a window lies outside of the ztoc")?;
    let window = at.check(window)?;
    let len = uncompressed.end.0.checked_sub(uncompressed.start.0).and_then(|len| usize::try_from(len).ok());
    let mut out = vec![0; len.context("a span's size is senseless")?];
    inflate_span(spans, id, &window, &input, &mut out)
        .with_context(|| format!("span {} of the layer", id.0))?;
    Ok(out)
}
