#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    soci_index::fuzzing::image_config(data);
});
