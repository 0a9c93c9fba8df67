#![no_main]

#[path = "../bodies/ztoc.rs"]
mod bodies;

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    bodies::ztoc_edit(data);
});
