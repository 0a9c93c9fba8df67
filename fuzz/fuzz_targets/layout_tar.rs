#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    soci_index::fuzzing::layout_tar(data);
});
