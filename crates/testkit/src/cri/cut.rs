//! Pulls that break off: the connection is closed before all of the call was sent.

use std::io::{self, Read as _, Write as _};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use prost::Message as _;

use super::{AuthConfig, pull_request};
use crate::frames;

/// How long the service may take to close its end.
const LIMIT: Duration = Duration::from_secs(60);

/// How many bytes are not sent: of the namespace, which comes last.
const CUT: usize = 32;

/// Where a pull breaks off. The login is before the cut.
#[derive(Debug, Clone, Copy)]
pub enum Cut {
    /// Within the HTTP/2 frame of the message.
    Frame,
    /// Within the message, after a frame that is whole.
    Message,
}

/// Begins to pull an image, breaks off, and waits until the service has closed the connection.
///
/// # Errors
/// Where nobody listens, or the connection stays open.
pub fn pull(socket: &Path, cut: Cut, image: &str, auth: AuthConfig) -> io::Result<()> {
    let message = pull_request(image, Some(auth), &"n".repeat(2 * CUT)).encode_to_vec();
    let length = u32::try_from(message.len()).unwrap_or(u32::MAX).to_be_bytes();
    let message = [&[0], &length[..], &message].concat();
    let begun = match cut {
        Cut::Frame => without_end(frames::frame(0, 1, 1, &message)),
        Cut::Message => frames::frame(0, 0, 1, &without_end(message)),
    };
    let mut stream = UnixStream::connect(socket)?;
    stream.set_read_timeout(Some(LIMIT))?;
    stream.write_all(&frames::opening("PullImage", "localhost"))?;
    stream.write_all(&begun)?;
    stream.shutdown(Shutdown::Write)?;
    match stream.read_to_end(&mut Vec::new()) {
        Err(error) if error.kind() != io::ErrorKind::ConnectionReset => Err(error),
        _ => Ok(()),
    }
}

fn without_end(mut bytes: Vec<u8>) -> Vec<u8> {
    bytes.truncate(bytes.len().saturating_sub(CUT));
    bytes
}
