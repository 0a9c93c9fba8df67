//! The daemon's state at a moment, as JSON, for whoever debugs it.
//!
//! Names of images and mounts are in it, so it is served on a Unix socket of mode 0600 only.

use std::sync::Arc;

use serde::Serialize;

use crate::live::Live;
use crate::live::observe::State;
use crate::metrics::serve::Page;

#[derive(Debug, Serialize)]
struct Daemon {
    version: &'static str,
    pid: u32,
    /// Threads of the asynchronous runtime, and its tasks that have not ended.
    runtime_threads: usize,
    runtime_tasks: usize,
    /// Tasks that no thread has taken yet.
    runtime_queue: usize,
    open_files: usize,
    live: State,
}

/// Returns the page that shows the state of `live`. Called within the runtime that it is about.
pub fn page(live: Arc<Live>) -> Page {
    let runtime = tokio::runtime::Handle::current().metrics();
    let render = move || {
        let daemon = Daemon {
            version: env!("CARGO_PKG_VERSION"),
            pid: std::process::id(),
            runtime_threads: runtime.num_workers(),
            runtime_tasks: runtime.num_alive_tasks(),
            runtime_queue: runtime.global_queue_depth(),
            open_files: std::fs::read_dir("/proc/self/fd").map_or(0, Iterator::count),
            live: live.state(),
        };
        match serde_json::to_string_pretty(&daemon) {
            Ok(text) => text + "\n",
            Err(error) => serde_json::json!({ "error": error.to_string() }).to_string(),
        }
    };
    Page { path: "/debug/state", kind: "application/json", render: Arc::new(render) }
}
