//! Many callers of an image service at a steady rate, and how long each call took.

use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use hyper_util::rt::TokioIo;
use tonic::transport::{Channel, Endpoint, Uri};

use super::api::image_service_client::ImageServiceClient;
use super::{api, spec};

/// How many callers there are, how many calls they make together in a second, and how many in all.
#[derive(Debug, Clone, Copy)]
pub struct Rate {
    /// Callers, each with a connection of its own.
    pub callers: u32,
    /// Calls of all of them in a second.
    pub per_second: u32,
    /// Calls of each of them.
    pub calls: u32,
}

/// Calls `ImageStatus` at a rate and returns how long each call took.
///
/// # Errors
/// Where a call fails.
pub async fn image_status(socket: &Path, rate: Rate) -> io::Result<Vec<Duration>> {
    let pace = Duration::from_secs(1) * rate.callers / rate.per_second;
    let callers = (0..rate.callers).map(|caller| {
        let socket = socket.to_owned();
        tokio::spawn(async move {
            let mut client = connect(&socket).await?;
            let mut times = Vec::new();
            // The callers are spread over the pace.
            let begin = tokio::time::Instant::now() + pace * caller / rate.callers;
            let mut turns = tokio::time::interval_at(begin, pace);
            for _ in 0..rate.calls {
                turns.tick().await;
                let request = api::ImageStatusRequest { image: Some(spec("reg.example/team/app:1")) };
                let start = Instant::now();
                client.image_status(request).await.map_err(io::Error::other)?;
                times.push(start.elapsed());
            }
            io::Result::Ok(times)
        })
    });
    let mut all = Vec::new();
    for caller in callers.collect::<Vec<_>>() {
        all.extend(caller.await.map_err(io::Error::other)??);
    }
    Ok(all)
}

/// Calls `ListImages` some times, one after the other, and returns how long each call took.
///
/// # Errors
/// Where a call fails.
pub async fn list_images(socket: &Path, calls: u32) -> io::Result<Vec<Duration>> {
    let mut client = connect(socket).await?;
    let mut times = Vec::new();
    for _ in 0..calls {
        let start = Instant::now();
        client.list_images(api::ListImagesRequest {}).await.map_err(io::Error::other)?;
        times.push(start.elapsed());
    }
    Ok(times)
}

async fn connect(socket: &Path) -> io::Result<ImageServiceClient<Channel>> {
    const WINDOW: u32 = 16 << 20;
    let socket: PathBuf = socket.to_owned();
    let connector = tower::service_fn(move |_: Uri| {
        let socket = socket.clone();
        async move { tokio::net::UnixStream::connect(socket).await.map(TokioIo::new) }
    });
    let endpoint = Endpoint::from_static("http://localhost")
        .initial_stream_window_size(WINDOW)
        .initial_connection_window_size(WINDOW);
    let channel = endpoint.connect_with_connector(connector).await.map_err(io::Error::other)?;
    Ok(ImageServiceClient::new(channel).max_decoding_message_size(32 << 20))
}
