//! What the fuzz target of image references does with its input, so that an ordinary test replays its corpus.
#![allow(clippy::unwrap_used, unreachable_pub, reason = "a test")]

use soci_oci::{ImageRef, RefError, RegistryName};

/// Reads `data` as a reference and as the name of a registry. What is one is the same again after it was written, unless its
/// full form is too long, and answers all questions.
pub fn reference(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    if let Ok(image) = text.parse::<ImageRef>() {
        match image.to_string().parse::<ImageRef>() {
            Ok(again) => assert_eq!(again, image),
            Err(error) => assert!(matches!(error, RefError::TooLong), "{image}: {error}"),
        }
        let name = format!("{}/{}", image.registry(), image.repository());
        assert_eq!(image.name().to_ascii_lowercase(), name, "but for a registry of one word");
        assert!(image.key().starts_with(&image.name()) && !image.object().is_empty());
        assert!(image.tag().is_some() || image.digest().is_some());
        registry(image.registry());
    }
    if let Ok(name) = RegistryName::new(text) {
        registry(&name);
    }
}

fn registry(name: &RegistryName) {
    assert_eq!(RegistryName::new(name.as_str()).as_ref(), Ok(name));
    assert!(!name.host().is_empty() && name.as_str().starts_with(name.host()));
    assert!(name.port().is_some() || name.host().len() == name.as_str().len());
    assert!(!name.endpoint().is_empty() && !name.identity().is_empty());
    assert_eq!(name.is_docker_hub(), name.identity() == "docker.io");
}
