#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    soci_kubernetes::fuzzing::fuzz_kubeconfig(data);
});
