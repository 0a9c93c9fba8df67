#![no_main]

#[path = "../bodies/filter.rs"]
mod bodies;

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    bodies::filter(data);
});
