//! Addresses to listen on, in the form that Go's `net.Listen` takes: `host:port`, where no host means all addresses.

use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::str::FromStr;

/// A TCP address to listen on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TcpAddress {
    /// An address or a name; none for all addresses of this machine.
    pub host: Option<String>,
    /// The port.
    pub port: u16,
    /// Of which kind its addresses may be.
    pub family: Family,
}

/// Which kind of address.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Family {
    /// Either.
    Any,
    /// IPv4 alone.
    V4,
    /// IPv6 alone.
    V6,
}

impl Family {
    /// Whether `address` is of this kind.
    pub fn holds(self, address: &SocketAddr) -> bool {
        match self {
            Self::Any => true,
            Self::V4 => address.is_ipv4(),
            Self::V6 => address.is_ipv6(),
        }
    }
}

impl TcpAddress {
    /// Parses `host:port`, `:port`, or `[IPv6]:port`.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn parse(text: &str, family: Family) -> Result<Self, String> {
        let (host, port) = text
            .rsplit_once(':')
            .ok_or_else(|| format!("{text:?}: no port; write it as host:port, or :port for all addresses"))?;
        let port = u16::from_str(port)
            .ok()
            .filter(|_| port.bytes().all(|byte| byte.is_ascii_digit()))
            .ok_or_else(|| format!("{text:?}: the port {port:?} is not a number from 0 to 65535"))?;
        if host.is_empty() {
            return Ok(Self { host: None, port, family });
        }
        let of_another_kind = match kind(host).map_err(|what| format!("{text:?}: {what}"))? {
            Family::Any => false,
            kind => family != Family::Any && family != kind,
        };
        if of_another_kind {
            return Err(format!("{text:?}: not an address of the network that metrics_network names"));
        }
        let host = host.trim_start_matches('[').trim_end_matches(']').to_owned();
        Ok(Self { host: Some(host), port, family })
    }

    /// Returns the addresses of this machine that it stands for where no host is named, the preferred one first.
    pub fn everywhere(&self) -> Vec<SocketAddr> {
        let (v4, v6) =
            (SocketAddr::from((Ipv4Addr::UNSPECIFIED, self.port)), (Ipv6Addr::UNSPECIFIED, self.port).into());
        [v6, v4].into_iter().filter(|address| self.family.holds(address)).collect()
    }
}

/// Returns the kind of address that `host` is, either for a name.
fn kind(host: &str) -> Result<Family, String> {
    if let Some(inner) = host.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')) {
        // A zone, e.g. `%eth0`, says by which interface a link's own address is meant.
        let (address, zone) = inner.split_once('%').unwrap_or((inner, "-"));
        return match Ipv6Addr::from_str(address) {
            Ok(_) if !zone.is_empty() => Ok(Family::V6),
            _ => Err(format!("{inner:?} is no IPv6 address")),
        };
    }
    if Ipv4Addr::from_str(host).is_ok() {
        return Ok(Family::V4);
    }
    if Ipv6Addr::from_str(host).is_ok() {
        return Err("an IPv6 address is written in brackets, as [::1]:9090".to_owned());
    }
    let name = |byte: u8| byte.is_ascii_alphanumeric() || b"-._".contains(&byte);
    match host.bytes().all(name) && !host.bytes().all(|byte| byte.is_ascii_digit() || byte == b'.') {
        true => Ok(Family::Any),
        false => Err(format!("{host:?} is neither an address nor a name of a host")),
    }
}

impl std::fmt::Display for TcpAddress {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match &self.host {
            Some(host) if host.contains(':') => write!(f, "[{host}]:{}", self.port),
            host => write!(f, "{}:{}", host.as_deref().unwrap_or_default(), self.port),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_gos() {
        for (text, host) in [
            (":9090", None),
            ("127.0.0.1:9090", Some("127.0.0.1")),
            ("[::]:9090", Some("::")),
            ("[fe80::1%eth0]:9090", Some("fe80::1%eth0")),
            ("localhost:9090", Some("localhost")),
            ("node-1.example_x:9090", Some("node-1.example_x")),
        ] {
            let address = TcpAddress::parse(text, Family::Any).unwrap();
            assert_eq!((address.host.as_deref(), address.port), (host, 9090), "{text}");
            assert_eq!(address.to_string(), text);
        }
    }

    #[test]
    fn what_is_no_address_is_refused_with_what_is_wrong() {
        for (text, what) in [
            ("9090", "no port"),
            ("localhost", "no port"),
            ("localhost:", "port"),
            ("localhost:http", "port"),
            (":70000", "port"),
            (":+80", "port"),
            ("::1:9090", "in brackets"),
            ("[127.0.0.1]:9090", "no IPv6 address"),
            ("[fe80::1%]:9090", "no IPv6 address"),
            ("300.1.1.1:9090", "neither"),
            ("http://localhost:9090", "neither"),
            ("a b:9090", "neither"),
        ] {
            let error = TcpAddress::parse(text, Family::Any).expect_err(text);
            assert!(error.contains(what) && error.contains(text), "{text}: {error}");
        }
    }

    #[test]
    fn a_family_is_kept_to() {
        assert!(TcpAddress::parse("[::1]:1", Family::V4).is_err());
        assert!(TcpAddress::parse("127.0.0.1:1", Family::V6).is_err());
        let everywhere = |family| TcpAddress::parse(":1", family).unwrap().everywhere();
        assert_eq!(everywhere(Family::V4), ["0.0.0.0:1".parse().unwrap()]);
        assert_eq!(everywhere(Family::V6), ["[::]:1".parse().unwrap()]);
        assert_eq!(everywhere(Family::Any), ["[::]:1".parse().unwrap(), "0.0.0.0:1".parse().unwrap()]);
    }
}
