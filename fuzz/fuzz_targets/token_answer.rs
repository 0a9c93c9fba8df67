#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    soci_auth::fuzzing::fuzz_token_answer(data);
});
