//! Platforms of image manifests: parsing, normalisation and matching as containerd does.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// The platform an image manifest is for.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Platform {
    /// CPU architecture in Go's naming, e.g. `amd64`.
    #[serde(default)]
    pub architecture: String,
    /// Operating system in Go's naming, e.g. `linux`.
    #[serde(default)]
    pub os: String,
    /// Version of the operating system, used by Windows images.
    #[serde(default, rename = "os.version", skip_serializing_if = "Option::is_none")]
    pub os_version: Option<String>,
    /// Required features of the operating system.
    #[serde(default, rename = "os.features", skip_serializing_if = "Option::is_none")]
    pub os_features: Option<Vec<String>>,
    /// Variant of the architecture, e.g. `v8`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub variant: Option<String>,
}

/// A text that is not a platform.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("could not parse platform {0}")]
pub struct PlatformError(String);

impl Platform {
    /// Returns a platform of this system and architecture, normalised.
    pub fn new(os: &str, architecture: &str, variant: Option<&str>) -> Self {
        Self {
            architecture: architecture.to_owned(),
            os: os.to_owned(),
            os_version: None,
            os_features: None,
            variant: variant.filter(|variant| !variant.is_empty()).map(str::to_owned),
        }
        .normalized()
    }

    /// Returns the platform this program was built for.
    pub fn host() -> Self {
        let architecture = match std::env::consts::ARCH {
            "x86_64" => "amd64",
            "aarch64" => "arm64",
            "x86" => "386",
            "powerpc64" => "ppc64le",
            other => other,
        };
        Self::new("linux", architecture, None)
    }

    /// Returns the platform with aliases replaced, as containerd's `platforms.Normalize`.
    pub fn normalized(&self) -> Self {
        let mut platform = self.clone();
        platform.os = match self.os.to_ascii_lowercase().as_str() {
            "macos" => "darwin".into(),
            other => other.to_owned(),
        };
        let architecture = self.architecture.to_ascii_lowercase();
        let variant = self.variant.as_deref().unwrap_or_default().to_ascii_lowercase();
        let (architecture, variant) = match (architecture.as_str(), variant.as_str()) {
            ("i386", _) => ("386", ""),
            ("x86_64" | "x86-64" | "amd64", "v1") => ("amd64", ""),
            ("x86_64" | "x86-64" | "amd64", variant) => ("amd64", variant),
            ("aarch64" | "arm64", "8" | "v8") => ("arm64", ""),
            ("aarch64" | "arm64", variant) => ("arm64", variant),
            ("armhf", _) => ("arm", "v7"),
            ("armel", _) => ("arm", "v6"),
            ("arm", "" | "7") => ("arm", "v7"),
            ("arm", "5") => ("arm", "v5"),
            ("arm", "6") => ("arm", "v6"),
            ("arm", "8") => ("arm", "v8"),
            other => other,
        };
        platform.architecture = architecture.to_owned();
        platform.variant = (!variant.is_empty()).then(|| variant.to_owned());
        platform
    }

    /// Whether a manifest for `self` runs where `wanted` is asked for: same system, architecture and variant.
    pub fn matches(&self, wanted: &Self) -> bool {
        let (ours, theirs) = (self.normalized(), wanted.normalized());
        ours.os == theirs.os
            && ours.architecture == theirs.architecture
            && ours.variant == theirs.variant
            && (theirs.os_version.is_none() || ours.os_version == theirs.os_version)
    }

    /// Whether this is the placeholder that image builders give to attestations.
    pub fn is_unknown(&self) -> bool {
        self.os == "unknown" || self.architecture == "unknown"
    }
}

impl fmt::Display for Platform {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.os, self.architecture)?;
        match &self.variant {
            Some(variant) => write!(f, "/{variant}"),
            None => Ok(()),
        }
    }
}

impl FromStr for Platform {
    type Err = PlatformError;

    /// Parses `os`, `architecture`, `os/architecture` or `os/architecture/variant`.
    fn from_str(text: &str) -> Result<Self, PlatformError> {
        let error = || PlatformError(text.chars().take(80).collect());
        let parts: Vec<&str> = text.split('/').collect();
        let valid = |part: &&str| {
            !part.is_empty()
                && part.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b'-' | b'.'))
        };
        if !parts.iter().all(valid) {
            return Err(error());
        }
        let host = Self::host();
        match parts.as_slice() {
            [os @ ("linux" | "windows" | "darwin" | "freebsd" | "macos")] => {
                Ok(Self::new(os, &host.architecture, host.variant.as_deref()))
            }
            [architecture] => {
                let known = Self::new("linux", architecture, None);
                let architectures =
                    ["386", "amd64", "arm", "arm64", "loong64", "mips64le", "ppc64le", "riscv64", "s390x"];
                architectures.contains(&known.architecture.as_str()).then_some(known).ok_or_else(error)
            }
            [os, architecture] => Ok(Self::new(os, architecture, None)),
            [os, architecture, variant] => Ok(Self::new(os, architecture, Some(variant))),
            _ => Err(error()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn aliases_are_normalised() {
        for (text, expected) in [
            ("linux/amd64", "linux/amd64"),
            ("linux/x86_64", "linux/amd64"),
            ("linux/arm64/v8", "linux/arm64"),
            ("linux/arm", "linux/arm/v7"),
            ("linux/arm/v6", "linux/arm/v6"),
            ("arm64", "linux/arm64"),
        ] {
            assert_eq!(text.parse::<Platform>().unwrap().to_string(), expected);
        }
        for text in ["", "/", "linux/", "a/b/c/d", "linux/am d64", "nonsense"] {
            assert!(text.parse::<Platform>().is_err(), "{text}");
        }
    }

    #[test]
    fn matching_is_strict_in_the_variant() {
        let amd64 = Platform::new("linux", "amd64", None);
        assert!(amd64.matches(&"linux/x86_64".parse().unwrap()));
        assert!(!amd64.matches(&"linux/arm64".parse().unwrap()));
        assert!(!Platform::new("linux", "arm", Some("v6")).matches(&Platform::new("linux", "arm", None)));
    }
}
