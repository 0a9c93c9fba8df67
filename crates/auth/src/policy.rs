//! May a credential of this registry go to that realm?
//!
//! A challenge is text from the network: whoever can answer for a registry names the host to which the password is sent.
//! These rules are checked before anything leaves; the address rules at connect time, since a name may resolve to
//! anything.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use url::Url;

use crate::origin::{Origin, Scheme};

/// A realm or address to which no credential goes.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PolicyError {
    /// Not an absolute http or https URL with a host.
    #[error("{registry}: the token realm {realm:?} is not an absolute http or https URL")]
    NotAbsolute {
        /// The registry that named it.
        registry: String,
        /// The realm, without query.
        realm: String,
    },
    /// The realm holds a user name or password.
    #[error("{registry}: the token realm on {host} holds a user name or password, nothing is sent there")]
    Userinfo {
        /// The registry that named it.
        registry: String,
        /// The realm's host.
        host: String,
    },
    /// Plain http although the registry is reached by https.
    #[error(
        "{registry}: the token realm on {host} is plain http while the registry is https, nothing is sent there"
    )]
    Downgrade {
        /// The registry that named it.
        registry: String,
        /// The realm's host.
        host: String,
    },
    /// An address that no token service has.
    #[error("{registry}: the token realm is at {address}, a {what} address, nothing is sent there")]
    Address {
        /// The registry that named it.
        registry: String,
        /// The address.
        address: IpAddr,
        /// Why not.
        what: &'static str,
    },
}

/// Checks whether a credential that is for `origin` may be sent to `realm`.
///
/// # Errors
/// [`PolicyError`], naming registry and reason, never the realm's query.
pub fn check_realm(origin: &Origin, realm: &Url) -> Result<(), PolicyError> {
    let registry = origin.to_string();
    let Some(target) = Origin::of_url(realm) else {
        let mut shown = realm.clone();
        shown.set_query(None);
        let _ = shown.set_password(None);
        let _ = shown.set_username("");
        return Err(PolicyError::NotAbsolute { registry, realm: shown.into() });
    };
    let host = target.host().to_owned();
    if !realm.username().is_empty() || realm.password().is_some() {
        return Err(PolicyError::Userinfo { registry, host });
    }
    if target.scheme() == Scheme::Http && origin.scheme() == Scheme::Https {
        return Err(PolicyError::Downgrade { registry, host });
    }
    match target.address() {
        Some(address) if !is_same_host(origin, realm) => check_address(origin, address),
        _ => Ok(()),
    }
}

/// Whether `realm` is on the registry's own host, in which case its address needs no check.
pub fn is_same_host(origin: &Origin, realm: &Url) -> bool {
    Origin::of_url(realm).is_some_and(|target| target.host() == origin.host())
}

/// Checks the address to which a token request for `origin` is about to be sent. To be called at connect time, for a
/// realm on another host than the registry's ([`is_same_host`]). Private ranges are allowed: a token service inside a
/// company is common.
///
/// # Errors
/// [`PolicyError::Address`] for link-local, metadata, unspecified, multicast, broadcast, and (unless the registry
/// itself is this machine) loopback addresses, IPv4-mapped IPv6 ones included.
pub fn check_address(origin: &Origin, address: IpAddr) -> Result<(), PolicyError> {
    let address = match address {
        IpAddr::V4(_) => address,
        IpAddr::V6(v6) => embedded(v6).map_or(address, IpAddr::V4),
    };
    let what = match address {
        IpAddr::V4(v4) if v4 == Ipv4Addr::new(100, 100, 100, 200) => Some("metadata"),
        IpAddr::V6(v6) if v6 == Ipv6Addr::new(0xfd00, 0xec2, 0, 0, 0, 0, 0, 0x254) => Some("metadata"),
        IpAddr::V4(v4) if v4.is_link_local() => Some("link-local"),
        IpAddr::V6(v6) if v6.is_unicast_link_local() => Some("link-local"),
        IpAddr::V4(v4) if v4.is_broadcast() => Some("broadcast"),
        IpAddr::V4(v4) if v4.octets()[0] == 0 => Some("unspecified"),
        _ if address.is_unspecified() => Some("unspecified"),
        _ if address.is_multicast() => Some("multicast"),
        _ if address.is_loopback() && !origin.is_loopback() => Some("loopback"),
        _ => None,
    };
    match what {
        Some(what) => Err(PolicyError::Address { registry: origin.to_string(), address, what }),
        None => Ok(()),
    }
}

/// Returns the IPv4 address inside a mapped (`::ffff:a.b.c.d`) or NAT64 (`64:ff9b::a.b.c.d`) one.
fn embedded(address: Ipv6Addr) -> Option<Ipv4Addr> {
    let [a, b, c, d, e, f, high, low] = address.segments();
    let [high, low] = [high.to_be_bytes(), low.to_be_bytes()];
    match [a, b, c, d, e, f] {
        [0, 0, 0, 0, 0, 0xffff] | [0x64, 0xff9b, 0, 0, 0, 0] => {
            Some(Ipv4Addr::new(high[0], high[1], low[0], low[1]))
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn origin(url: &str) -> Origin {
        Origin::of_url(&url.parse().unwrap()).unwrap()
    }

    fn check(registry: &str, realm: &str) -> Result<(), PolicyError> {
        check_realm(&origin(registry), &realm.parse().unwrap())
    }

    #[test]
    fn t114_realms_that_get_no_credential() {
        let https = "https://reg.example";
        for realm in [
            "http://169.254.169.254/",
            "https://169.254.169.254/token",
            "http://other.example/token",
            "http://reg.example/token",
            "https://user:pw@reg.example/token",
            "https://[::ffff:169.254.169.254]/",
            "https://[fd00:ec2::254]/",
            "https://100.100.100.200/",
            "https://0.0.0.0/",
            "https://127.0.0.1/",
            "file:///etc/passwd",
            "data:x",
        ] {
            assert!(check(https, realm).is_err(), "{realm}");
        }
        let error = check(https, "https://user:hunter2@reg.example/?t=hunter2").unwrap_err();
        assert!(!format!("{error} {error:?}").contains("hunter2"));
    }

    #[test]
    fn realms_that_are_fine() {
        for (registry, realm) in [
            ("https://reg.example", "https://auth.other.example/token"),
            ("https://reg.example", "https://10.0.0.7/token"),
            ("https://127.0.0.1:5000", "https://127.0.0.1:5001/token"),
            ("http://localhost:5000", "http://127.0.0.1:5001/token"),
            ("https://169.254.1.1", "https://169.254.1.1/token"),
        ] {
            assert_eq!(check(registry, realm), Ok(()), "{registry} {realm}");
        }
    }

    #[test]
    fn t114_addresses_are_checked_when_connecting() {
        let registry = origin("https://reg.example");
        for address in [
            "169.254.169.254",
            "::ffff:169.254.169.254",
            "64:ff9b::a9fe:a9fe",
            "fe80::1",
            "::",
            "ff02::1",
            "127.0.0.1",
            "::1",
            "0.1.2.3",
        ] {
            assert!(check_address(&registry, address.parse().unwrap()).is_err(), "{address}");
        }
        for address in ["10.1.2.3", "192.168.1.1", "fd00::1", "93.184.216.34"] {
            assert_eq!(check_address(&registry, address.parse().unwrap()), Ok(()), "{address}");
        }
        assert_eq!(check_address(&origin("https://localhost:5000"), "127.0.0.1".parse().unwrap()), Ok(()));
    }
}
