#![no_main]

#[path = "../bodies/config.rs"]
mod bodies;

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    bodies::daemon_config(data);
});
