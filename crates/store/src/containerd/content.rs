//! containerd's content service as a [`ContentStore`].

use std::hash::{BuildHasher as _, RandomState};
use std::ops::Range;
use std::sync::Arc;
use std::time::SystemTime;

use async_trait::async_trait;
use bytes::{Bytes, BytesMut};
use futures::StreamExt as _;
use soci_oci::{BlobSource, BlobStream, Descriptor, Digest, FetchContext, FetchError, FetchErrorKind};
use tokio_stream::wrappers::ReceiverStream;

use super::{Containerd, MAX_MESSAGE, label_mask, system_time};
use crate::proto::services::content::v1 as wire;
use crate::proto::services::content::v1::content_client::ContentClient;
use crate::{ContentInfo, ContentStore, StoreError};

/// Bytes of content in one message that is sent.
const PIECE: usize = 1 << 20;
/// Messages that wait to be sent.
const QUEUE: usize = 2;

/// A SOCI index refers to the empty configuration, and to its first zTOC if the Go daemon stored it.
const INDEX_FILTERS: [&str; 2] = [
    "labels.\"containerd.io/gc.ref.content.config\"==\
     sha256:44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a",
    "labels.\"containerd.io/gc.ref.content.ztoc.0\"",
];

#[derive(Debug, Clone)]
pub(super) struct Content {
    containerd: Containerd,
    client: ContentClient<tonic::transport::Channel>,
}

impl Content {
    pub(super) fn new(containerd: Containerd) -> Self {
        let client = ContentClient::new(containerd.channel.clone()).max_decoding_message_size(MAX_MESSAGE);
        Self { containerd, client }
    }

    async fn list(&self, filters: Vec<String>) -> Result<Vec<ContentInfo>, StoreError> {
        let (action, what) = ("listing", "content");
        let request = self.containerd.request(wire::ListContentRequest { filters })?;
        let mut client = self.client.clone();
        let answer = self.containerd.within(action, what, client.list(request)).await?;
        let mut messages = answer.into_inner();
        let mut all = Vec::new();
        while let Some(message) = self.containerd.within(action, what, messages.message()).await? {
            all.extend(message.info.into_iter().filter_map(decode));
        }
        Ok(all)
    }

    /// Writes what `pieces` yields as the content of `descriptor`, under the name `reference` until it is whole. Returns
    /// false when it is there already.
    async fn write(
        &self,
        descriptor: &Descriptor,
        reference: &str,
        pieces: &mut BlobStream,
        labels: &[(String, String)],
    ) -> Result<bool, StoreError> {
        let (action, what) = ("writing", descriptor.digest.to_string());
        let too_large = || StoreError::TooLarge {
            digest: descriptor.digest,
            size: descriptor.size,
            limit: i64::MAX as u64,
        };
        let total = i64::try_from(descriptor.size).map_err(|_| too_large())?;
        let template = wire::WriteContentRequest {
            r#ref: reference.to_owned(),
            total,
            expected: what.clone(),
            ..wire::WriteContentRequest::default()
        };
        let (sender, receiver) = tokio::sync::mpsc::channel(QUEUE);
        let mut session = Session { content: self, sender, answers: None, what: what.clone() };
        // Asking for the state first tells whether another namespace has the content: then nothing needs to be sent.
        let stat = wire::WriteContentRequest { action: wire::WriteAction::Stat.into(), ..template.clone() };
        let mut client = self.client.clone();
        session.send(stat).await?;
        let request = self.containerd.request(ReceiverStream::new(receiver))?;
        match self.containerd.within(action, &what, client.write(request)).await {
            Ok(answer) => session.answers = Some(answer.into_inner()),
            Err(StoreError::Exists(_)) => return Ok(false),
            Err(error) => return Err(error),
        }
        let mut offset = match session.answer().await {
            Ok(answer) => answer.offset,
            Err(StoreError::Exists(_)) => return Ok(false),
            Err(error) => return Err(error),
        };
        if offset != total {
            offset = 0;
            while let Some(piece) = pieces.next().await {
                let mut piece =
                    piece.map_err(|source| StoreError::Source { digest: descriptor.digest, source })?;
                while !piece.is_empty() {
                    let data = piece.split_to(piece.len().min(PIECE));
                    let len = data.len() as i64;
                    let message = wire::WriteContentRequest {
                        action: wire::WriteAction::Write.into(),
                        offset,
                        data: data.into(),
                        ..template.clone()
                    };
                    session.send(message).await?;
                    offset = session.answer().await?.offset.max(offset.saturating_add(len));
                }
            }
            if offset != total {
                let found = format!("{offset} of the {total} bytes announced");
                return Err(StoreError::Mismatch { digest: descriptor.digest, found });
            }
        }
        let commit = wire::WriteContentRequest {
            action: wire::WriteAction::Commit.into(),
            offset,
            labels: labels.iter().cloned().collect(),
            ..template
        };
        session.send(commit).await?;
        match session.answer().await {
            Ok(answer) if answer.digest.is_empty() || answer.digest == what => Ok(true),
            Ok(answer) => Err(StoreError::Mismatch { digest: descriptor.digest, found: answer.digest }),
            Err(StoreError::Exists(_)) => Ok(false),
            Err(StoreError::Containerd { code: tonic::Code::FailedPrecondition, message, .. }) => {
                Err(StoreError::Mismatch { digest: descriptor.digest, found: message })
            }
            Err(error) => Err(error),
        }
    }
}

/// Returns a name for a write, its own each time: two that write the same content do not wait for each other.
fn reference(digest: &Digest) -> String {
    let random = RandomState::new().hash_one(SystemTime::now());
    format!("soci-{}-{random:016x}", digest.hex())
}

impl Content {
    /// Tells containerd to forget an unfinished write; if it cannot be told, the lease or its own clean-up does.
    async fn abort(&self, reference: &str) {
        let Ok(request) = self.containerd.request(wire::AbortRequest { r#ref: reference.to_owned() }) else {
            return;
        };
        let mut client = self.client.clone();
        match self.containerd.within("aborting the write", reference, client.abort(request)).await {
            Ok(_) => {}
            Err(error) => tracing::debug!(%error, "unfinished write is left to containerd"),
        }
    }
}

/// One conversation of the write call: a message is sent, and its answer awaited.
struct Session<'a> {
    content: &'a Content,
    sender: tokio::sync::mpsc::Sender<wire::WriteContentRequest>,
    answers: Option<tonic::Streaming<wire::WriteContentResponse>>,
    what: String,
}

impl Session<'_> {
    async fn send(&self, message: wire::WriteContentRequest) -> Result<(), StoreError> {
        let sent = async {
            // A closed channel means that containerd ended the call; its answer says why.
            let _ = self.sender.send(message).await;
            Ok(())
        };
        self.content.containerd.within("writing", &self.what, sent).await
    }

    async fn answer(&mut self) -> Result<wire::WriteContentResponse, StoreError> {
        let ended = || StoreError::Protocol {
            action: "writing",
            what: self.what.clone(),
            found: "the end of the call".to_owned(),
        };
        let Some(answers) = &mut self.answers else { return Err(ended()) };
        let answer = self.content.containerd.within("writing", &self.what, answers.message()).await?;
        answer.ok_or_else(ended)
    }
}

fn decode(info: wire::Info) -> Option<ContentInfo> {
    Some(ContentInfo {
        digest: info.digest.parse().ok()?,
        size: u64::try_from(info.size).ok()?,
        created: system_time(info.created_at),
        labels: info.labels.into_iter().collect(),
    })
}

#[async_trait]
impl ContentStore for Content {
    async fn info(&self, digest: &Digest) -> Result<Option<ContentInfo>, StoreError> {
        let (action, what) = ("looking at", digest.to_string());
        let request = self.containerd.request(wire::InfoRequest { digest: what.clone() })?;
        let mut client = self.client.clone();
        let answer = match self.containerd.within(action, &what, client.info(request)).await {
            Ok(answer) => answer.into_inner(),
            Err(error) if error.is_not_found() => return Ok(None),
            Err(error) => return Err(error),
        };
        let malformed = || StoreError::Protocol { action, what, found: "no content information".to_owned() };
        answer.info.and_then(decode).filter(|info| info.digest == *digest).ok_or_else(malformed).map(Some)
    }

    async fn read(&self, digest: &Digest, max: u64) -> Result<Option<Bytes>, StoreError> {
        let Some(info) = self.info(digest).await? else { return Ok(None) };
        if info.size > max {
            return Err(StoreError::TooLarge { digest: *digest, size: info.size, limit: max });
        }
        let mut stream = match Blob::new(self, digest, info.size).stream(0..info.size).await {
            Ok(stream) => stream,
            Err(error) if error.is_not_found() => return Ok(None),
            Err(error) => return Err(error),
        };
        let mut bytes = BytesMut::with_capacity(usize::try_from(info.size).unwrap_or(0));
        let mut hasher = digest.hasher();
        while let Some(piece) = stream.next().await {
            let piece = piece.map_err(|source| StoreError::Source { digest: *digest, source })?;
            hasher.update(&piece);
            bytes.extend_from_slice(&piece);
        }
        let found = hasher.finish();
        if found != *digest {
            return Err(StoreError::Corrupt {
                digest: *digest,
                found: format!("{found}, {} bytes", bytes.len()),
            });
        }
        Ok(Some(bytes.freeze()))
    }

    async fn source(&self, digest: &Digest) -> Result<Option<(Arc<dyn BlobSource>, u64)>, StoreError> {
        let Some(info) = self.info(digest).await? else { return Ok(None) };
        Ok(Some((Arc::new(Blob::new(self, digest, info.size)), info.size)))
    }

    async fn put(
        &self,
        descriptor: &Descriptor,
        bytes: Bytes,
        labels: &[(String, String)],
    ) -> Result<(), StoreError> {
        if bytes.len() as u64 != descriptor.size || !descriptor.digest.verifies(&bytes) {
            let found = format!("{}, {} bytes", Digest::of(&bytes), bytes.len());
            return Err(StoreError::Mismatch { digest: descriptor.digest, found });
        }
        self.put_stream(descriptor, futures::stream::iter([Ok(bytes)]).boxed(), labels).await
    }

    async fn put_stream(
        &self,
        descriptor: &Descriptor,
        mut stream: BlobStream,
        labels: &[(String, String)],
    ) -> Result<(), StoreError> {
        let reference = reference(&descriptor.digest);
        match self.write(descriptor, &reference, &mut stream, labels).await {
            Ok(true) => Ok(()),
            Ok(false) => self.label(&descriptor.digest, labels).await,
            Err(error) => {
                self.abort(&reference).await;
                Err(error)
            }
        }
    }

    async fn pin(&self, descriptor: &Descriptor) -> Result<bool, StoreError> {
        // An attempt to write what is there adds it to the lease; what is not there is not written.
        let reference = reference(&descriptor.digest);
        let nothing = FetchError::new(FetchErrorKind::NotFound, "nothing is to be written");
        let mut stream: BlobStream = futures::stream::iter([Err(nothing)]).boxed();
        match self.write(descriptor, &reference, &mut stream, &[]).await {
            Ok(written) => Ok(!written || self.info(&descriptor.digest).await?.is_some()),
            Err(StoreError::Source { .. }) => {
                self.abort(&reference).await;
                Ok(false)
            }
            Err(error) => Err(error),
        }
    }

    async fn label(&self, digest: &Digest, labels: &[(String, String)]) -> Result<(), StoreError> {
        if labels.is_empty() {
            return Ok(());
        }
        let what = digest.to_string();
        let info = wire::Info {
            digest: what.clone(),
            labels: labels.iter().cloned().collect(),
            ..wire::Info::default()
        };
        let message = wire::UpdateRequest { info: Some(info), update_mask: Some(label_mask(labels)) };
        let request = self.containerd.request(message)?;
        let mut client = self.client.clone();
        self.containerd.within("labelling", &what, client.update(request)).await.map(|_| ())
    }

    async fn delete(&self, digest: &Digest) -> Result<bool, StoreError> {
        let what = digest.to_string();
        let request = self.containerd.request(wire::DeleteContentRequest { digest: what.clone() })?;
        let mut client = self.client.clone();
        match self.containerd.within("removing", &what, client.delete(request)).await {
            Ok(_) => Ok(true),
            Err(error) if error.is_not_found() => Ok(false),
            Err(error) => Err(error),
        }
    }

    async fn walk(&self) -> Result<Vec<ContentInfo>, StoreError> {
        self.list(Vec::new()).await
    }

    async fn find(&self, label: &str, value: &str) -> Result<Vec<ContentInfo>, StoreError> {
        let quoted = |text: &str| text.replace('\\', "\\\\").replace('"', "\\\"");
        let filter = format!("labels.\"{}\"==\"{}\"", quoted(label), quoted(value));
        let mut all = self.list(vec![filter]).await?;
        all.retain(|info| info.labels.get(label).is_some_and(|of| of == value));
        Ok(all)
    }

    async fn index_candidates(&self) -> Result<Vec<ContentInfo>, StoreError> {
        let mut all = self.list(INDEX_FILTERS.map(str::to_owned).to_vec()).await?;
        all.retain(|info| info.size <= soci_oci::manifest::MAX_MANIFEST_SIZE);
        Ok(all)
    }
}

/// Content of containerd that is read in ranges.
#[derive(Debug)]
struct Blob {
    content: Content,
    digest: Digest,
    size: u64,
}

impl Blob {
    fn new(content: &Content, digest: &Digest, size: u64) -> Self {
        Self { content: content.clone(), digest: *digest, size }
    }

    async fn stream(&self, range: Range<u64>) -> Result<BlobStream, StoreError> {
        let what = self.digest.to_string();
        let outside = || StoreError::Protocol {
            action: "reading",
            what: what.clone(),
            found: format!("range {range:?} of {} bytes", self.size),
        };
        if range.start > range.end || range.end > self.size {
            return Err(outside());
        }
        if range.is_empty() {
            return Ok(futures::stream::empty().boxed());
        }
        let (offset, size) = match (i64::try_from(range.start), i64::try_from(range.end - range.start)) {
            (Ok(offset), Ok(size)) => (offset, size),
            _ => return Err(outside()),
        };
        let containerd = self.content.containerd.clone();
        let request = containerd.request(wire::ReadContentRequest { digest: what.clone(), offset, size })?;
        let mut client = self.content.client.clone();
        let answer = containerd.within("reading", &what, client.read(request)).await?;
        let state = (Some(answer.into_inner()), range.start, range.end, containerd, what);
        let stream = futures::stream::unfold(state, |(messages, at, end, containerd, what)| async move {
            let mut messages = messages?;
            let fail = |kind, message: String| {
                let item = Err(FetchError::new(kind, message));
                Some((item, (None, at, end, containerd.clone(), what.clone())))
            };
            if at == end {
                return None;
            }
            let message = match containerd.within("reading", &what, messages.message()).await {
                Ok(Some(message)) => message,
                Ok(None) => {
                    let text = format!("{what}: containerd's content ended {} bytes early", end - at);
                    return fail(FetchErrorKind::Protocol, text);
                }
                Err(error) => {
                    let kind = error.fetch_kind();
                    let item =
                        Err(FetchError::because(kind, format!("{what}: reading from containerd"), error));
                    return Some((item, (None, at, end, containerd, what)));
                }
            };
            let next = at.saturating_add(message.data.len() as u64);
            // The offset that a message names counts from the start of the content or of the range, by version: the order
            // of messages is what counts.
            if message.data.is_empty() || next > end {
                let text =
                    format!("{what}: containerd sent {} bytes, {} are left", message.data.len(), end - at);
                return fail(FetchErrorKind::Protocol, text);
            }
            Some((Ok(Bytes::from(message.data)), (Some(messages), next, end, containerd, what)))
        });
        Ok(stream.boxed())
    }
}

#[async_trait]
impl BlobSource for Blob {
    async fn open(&self, range: Range<u64>, context: &FetchContext) -> Result<BlobStream, FetchError> {
        match tokio::time::timeout(context.remaining(), self.stream(range)).await {
            Ok(result) => result.map_err(FetchError::from),
            Err(_) => {
                let message = format!("{}: containerd did not answer in time", self.digest);
                Err(FetchError::new(FetchErrorKind::Unavailable, message))
            }
        }
    }
}
