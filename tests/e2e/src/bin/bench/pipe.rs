//! The least that anything between a caller and its server can add: bytes moved unread, by a thread of their own.

use std::os::unix::net::UnixListener as Listener;
use std::path::Path;
use std::thread::JoinHandle;

use anyhow::{Context as _, Result};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::oneshot;

/// A running pipe; it ends with this.
#[derive(Debug)]
pub(crate) struct Pipe {
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Pipe {
    /// Moves what comes in at `front` to `back`, and back.
    pub(crate) fn start(front: &Path, back: &Path) -> Result<Self> {
        let listener = Listener::bind(front).with_context(|| format!("listen at {}", front.display()))?;
        listener.set_nonblocking(true)?;
        let runtime = tokio::runtime::Builder::new_current_thread().enable_io().build()?;
        let (stop, stopped) = oneshot::channel();
        let back = back.to_owned();
        let listener = {
            let _within = runtime.enter();
            UnixListener::from_std(listener)?
        };
        let work = async move {
            while let Ok((mut near, _)) = listener.accept().await {
                let back = back.clone();
                tokio::spawn(async move {
                    // A caller that hangs up ends its pair, as it should.
                    if let Ok(mut far) = UnixStream::connect(&back).await {
                        let _ = tokio::io::copy_bidirectional(&mut near, &mut far).await;
                    }
                });
            }
        };
        let thread = std::thread::Builder::new().name("pipe".to_owned()).spawn(move || {
            runtime.block_on(async {
                tokio::select! {
                    () = work => {}
                    _ = stopped => {}
                }
            });
        })?;
        Ok(Self { stop: Some(stop), thread: Some(thread) })
    }
}

impl Drop for Pipe {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}
