//! An image service without images: answers at once, so that what stands before it can be measured.

use std::convert::Infallible;
use std::io;
use std::path::Path;
use std::sync::Arc;

use bytes::{BufMut as _, Bytes, BytesMut};
use http::{HeaderMap, HeaderValue, Request, Response};
use http_body::Frame;
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt as _, StreamBody};
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo};
use prost::Message as _;
use tokio::net::UnixListener;
use tokio::task::JoinHandle;

use super::api;

/// Window per stream and connection: an answer may be 16 MiB.
const WINDOW: u32 = 16 << 20;

/// A running service; ends when dropped.
#[derive(Debug)]
pub struct FakeImageService(JoinHandle<()>);

impl FakeImageService {
    /// Listens at `socket`; its list of images has about `list` bytes. Must be called inside a runtime.
    ///
    /// # Errors
    /// Where the socket cannot be bound.
    pub fn start(socket: &Path, list: usize) -> io::Result<Self> {
        let listener = UnixListener::bind(socket)?;
        let image = |at: usize| api::Image {
            id: format!("sha256:{at:064x}"),
            repo_tags: vec![format!("reg.example/team/app:{at:0200}")],
            repo_digests: Vec::new(),
            size: 1,
        };
        let images = (0..list / image(0).encoded_len()).map(image).collect();
        let listed = framed(&api::ListImagesResponse { images });
        let status = framed(&api::ImageStatusResponse { image: Some(image(0)) });
        let answers = Arc::new((status, listed));
        Ok(Self(tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let answers = Arc::clone(&answers);
                let service = service_fn(move |request: Request<hyper::body::Incoming>| {
                    let answers = Arc::clone(&answers);
                    async move {
                        let bytes = match request.uri().path().ends_with("/ListImages") {
                            true => answers.1.clone(),
                            false => answers.0.clone(),
                        };
                        Ok::<_, Infallible>(answer(bytes))
                    }
                });
                tokio::spawn(async move {
                    let served = hyper::server::conn::http2::Builder::new(TokioExecutor::new())
                        .initial_stream_window_size(WINDOW)
                        .initial_connection_window_size(WINDOW)
                        .max_frame_size(1 << 20)
                        .serve_connection(TokioIo::new(stream), service);
                    // A caller that goes away is no trouble here.
                    let _ = served.await;
                });
            }
        })))
    }
}

impl Drop for FakeImageService {
    fn drop(&mut self) {
        self.0.abort();
    }
}

fn framed(message: &impl prost::Message) -> Bytes {
    let mut body = BytesMut::new();
    body.put_u8(0);
    body.put_u32(u32::try_from(message.encoded_len()).unwrap_or(u32::MAX));
    body.put_slice(&message.encode_to_vec());
    body.freeze()
}

fn answer(bytes: Bytes) -> Response<UnsyncBoxBody<Bytes, Infallible>> {
    let trailers =
        HeaderMap::from_iter([(http::HeaderName::from_static("grpc-status"), HeaderValue::from_static("0"))]);
    let frames = [Frame::data(bytes), Frame::trailers(trailers)].map(Ok);
    let mut response = Response::new(StreamBody::new(futures::stream::iter(frames)).boxed_unsync());
    response.headers_mut().insert("content-type", HeaderValue::from_static("application/grpc"));
    response
}
