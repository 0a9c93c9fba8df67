#![no_main]

#[path = "../bodies/reference.rs"]
mod bodies;

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    bodies::reference(data);
});
