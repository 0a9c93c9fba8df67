#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    soci_registry::fuzzing::presigned(data);
});
