#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    soci_auth::fuzzing::fuzz_helper_output(data);
});
