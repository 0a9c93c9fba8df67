//! The hidden directory in which a layer tells about itself.
//!
//! `.soci-snapshotter` at a layer's root can be looked up but is not listed; it has one file, `<layer digest>.json`, with
//! how much of the layer was fetched and the last failure. Names and fields are the reference's. A file of that name in
//! the layer itself wins.

use soci_oci::Digest;
use soci_oci::go_json;

/// Name of the directory.
pub(crate) const NAME: &[u8] = b".soci-snapshotter";

/// Where the numbers in the state file come from.
pub trait LayerState: Send + Sync + std::fmt::Debug {
    /// The layer, as its image names it.
    fn digest(&self) -> &Digest;
    /// Size of the layer's blob in bytes.
    fn size(&self) -> u64;
    /// Bytes of the blob that were fetched.
    fn fetched(&self) -> u64;
}

/// Returns the name of the state file.
pub(crate) fn file_name(state: &dyn LayerState) -> String {
    format!("{}.json", state.digest())
}

/// Returns the content of the state file; `error` is the last failure.
pub(crate) fn render(state: &dyn LayerState, error: Option<&str>) -> Vec<u8> {
    let (size, fetched) = (state.size(), state.fetched());
    #[expect(clippy::cast_precision_loss, reason = "a percentage for people")]
    let percent = if size == 0 { 100.0 } else { fetched as f64 / size as f64 * 100.0 };
    let error =
        error.and_then(|error| go_json::to_vec(error).ok()).and_then(|text| String::from_utf8(text).ok());
    let error = error.map(|text| format!("\"error\":{text},")).unwrap_or_default();
    // A float is written as Go does in the range that percentages have: shortest, without exponent.
    let digest = state.digest();
    format!(
        "{{{error}\"digest\":\"{digest}\",\"size\":{size},\"fetchedSize\":{fetched},\"fetchedPercent\":{percent}}}\n"
    )
    .into_bytes()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug)]
    struct State(Digest, u64, u64);

    impl LayerState for State {
        fn digest(&self) -> &Digest {
            &self.0
        }
        fn size(&self) -> u64 {
            self.1
        }
        fn fetched(&self) -> u64 {
            self.2
        }
    }

    #[test]
    fn state_has_the_form_of_the_reference() {
        let digest = Digest::of(b"");
        let text =
            |size, fetched, error| String::from_utf8(render(&State(digest, size, fetched), error)).unwrap();
        assert_eq!(
            text(3, 1, None),
            format!(
                "{{\"digest\":\"{digest}\",\"size\":3,\"fetchedSize\":1,\"fetchedPercent\":33.33333333333333}}\n"
            )
        );
        assert_eq!(
            text(2, 2, Some("span \"1\" <x>")),
            format!(
                "{{\"error\":\"span \\\"1\\\" \\u003cx\\u003e\",\"digest\":\"{digest}\",\"size\":2,\"fetchedSize\":2,\
                 \"fetchedPercent\":100}}\n"
            )
        );
        assert!(text(0, 0, None).contains("\"fetchedPercent\":100}"));
    }
}
