//! How an error is told: in one line, with everything that caused it.
//!
//! Error types name their cause as source and leave it out of their own message; logs and answers over gRPC have one line.

use std::error::Error;

/// Returns the messages of `error` and of everything that caused it, joined by `: `; a cause that the text before it
/// already ends with is not said twice.
pub fn with_causes(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        let said = cause.to_string();
        if !text.ends_with(&said) {
            text.push_str(": ");
            text.push_str(&said);
        }
        next = cause.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, thiserror::Error)]
    #[error("{0}")]
    struct Told(&'static str, #[source] std::io::Error);

    #[test]
    fn every_cause_is_named_once() {
        let full = || std::io::Error::other("disk is full");
        assert_eq!(with_causes(&Told("write record 3", full())), "write record 3: disk is full");
        assert_eq!(
            with_causes(&Told("write record 3: disk is full", full())),
            "write record 3: disk is full"
        );
        assert_eq!(with_causes(&full()), "disk is full");
    }
}
