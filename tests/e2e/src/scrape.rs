//! What the daemon says of itself: its metrics, and the state on its debug socket.

use std::io::{Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::path::Path;

use anyhow::{Context as _, Result};
use serde_json::Value;

/// Returns what a Unix socket serves at `/metrics`, headers included.
///
/// # Errors
/// Where nobody serves there.
pub fn scrape(socket: &Path) -> Result<String> {
    get(socket, "/metrics")
}

/// Returns the state that a Unix socket shows at `/debug/state`.
///
/// # Errors
/// Where nobody serves there, or something else.
pub fn state(socket: &Path) -> Result<Value> {
    let text = get(socket, "/debug/state")?;
    let (_, body) = text.split_once("\r\n\r\n").context("an answer without a body")?;
    Ok(serde_json::from_str(body)?)
}

fn get(socket: &Path, path: &str) -> Result<String> {
    let mut stream = UnixStream::connect(socket)?;
    let request = format!("GET {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n");
    stream.write_all(request.as_bytes())?;
    let mut text = String::new();
    stream.read_to_string(&mut text)?;
    Ok(text)
}
