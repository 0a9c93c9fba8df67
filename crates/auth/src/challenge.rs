//! What a host asks for: the `WWW-Authenticate` headers, by the grammar of RFC 9110 §11.
//!
//! Several headers, several challenges per header, quoted strings with escapes and commas, any case. What breaks the
//! grammar is skipped up to the next comma, what exceeds a cap is ignored; nothing panics. Bearer is preferred to Basic,
//! other schemes are not answered.

use http::HeaderMap;
use http::header::WWW_AUTHENTICATE;
use url::Url;

/// How many bytes of all headers together are looked at.
const MAX_BYTES: usize = 16 * 1024;
/// How many challenges are kept.
const MAX_CHALLENGES: usize = 16;
/// How many parameters of one challenge are kept.
const MAX_PARAMETERS: usize = 32;

/// One challenge.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Challenge {
    /// The scheme, lower case.
    pub scheme: String,
    /// Names, lower case, and values, unquoted, in order.
    pub parameters: Vec<(String, String)>,
}

/// What the host wants, of what can be given.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Demand {
    /// User name and password in every request.
    Basic,
    /// A token.
    Bearer(BearerDemand),
}

/// Where a token is had, and for what.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BearerDemand {
    /// The token endpoint. Not yet checked: see [`policy::check_realm`](crate::policy::check_realm).
    pub realm: Url,
    /// The service to name.
    pub service: Option<String>,
    /// The scopes that the challenge names, in order.
    pub scopes: Vec<String>,
}

/// Challenges none of which can be answered.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum ChallengeError {
    /// No Basic and no Bearer challenge.
    #[error("no Basic and no Bearer challenge")]
    NoneKnown,
    /// Bearer without a realm, or with one that is not a URL.
    #[error("the Bearer challenge names no valid realm")]
    BadRealm,
}

/// Returns the challenges of all `WWW-Authenticate` headers.
pub fn parse(headers: &HeaderMap) -> Vec<Challenge> {
    parse_values(headers.get_all(WWW_AUTHENTICATE).iter().map(|value| value.as_bytes()))
}

/// Returns the challenges in some header values.
pub fn parse_values<'a>(values: impl Iterator<Item = &'a [u8]>) -> Vec<Challenge> {
    let mut challenges = Vec::new();
    let mut budget = MAX_BYTES;
    for value in values {
        // A header that is cut would be misread at its end: it is left out whole.
        let Some(rest) = budget.checked_sub(value.len()) else { continue };
        budget = rest;
        parse_one(Cursor(value), &mut challenges);
    }
    challenges
}

/// Returns what to answer: Bearer with a valid realm if offered, else Basic.
///
/// # Errors
/// [`ChallengeError`] when there is neither.
pub fn choose(challenges: &[Challenge]) -> Result<Demand, ChallengeError> {
    let mut error = ChallengeError::NoneKnown;
    for challenge in challenges.iter().filter(|challenge| challenge.scheme == "bearer") {
        match challenge.get("realm").and_then(|realm| Url::parse(realm).ok()) {
            Some(realm) => {
                let service = challenge.get("service").filter(|service| !service.is_empty());
                let scopes = challenge.all("scope").flat_map(str::split_ascii_whitespace).map(str::to_owned);
                let (service, scopes) = (service.map(str::to_owned), scopes.collect());
                return Ok(Demand::Bearer(BearerDemand { realm, service, scopes }));
            }
            None => error = ChallengeError::BadRealm,
        }
    }
    match challenges.iter().any(|challenge| challenge.scheme == "basic") {
        true => Ok(Demand::Basic),
        false => Err(error),
    }
}

impl Challenge {
    /// Returns the first parameter of this name (lower case).
    pub fn get(&self, name: &str) -> Option<&str> {
        self.parameters.iter().find(|(key, _)| key == name).map(|(_, value)| value.as_str())
    }

    fn all<'a>(&'a self, name: &'static str) -> impl Iterator<Item = &'a str> {
        self.parameters.iter().filter(move |(key, _)| key == name).map(|(_, value)| value.as_str())
    }
}

fn parse_one(mut cursor: Cursor<'_>, challenges: &mut Vec<Challenge>) {
    let mut open = false;
    loop {
        cursor.skip(|byte| is_blank(byte) || byte == b',');
        if cursor.0.is_empty() {
            return;
        }
        let name = cursor.take(is_token);
        if name.is_empty() {
            cursor.skip_element();
            continue;
        }
        let after_name = cursor;
        cursor.skip(is_blank);
        if open && cursor.eat(b'=') {
            cursor.skip(is_blank);
            match cursor.value() {
                Some(value) => keep(challenges, name, value),
                None => cursor.skip_element(),
            }
            continue;
        }
        if challenges.len() >= MAX_CHALLENGES {
            return;
        }
        challenges.push(Challenge { scheme: lower(name), parameters: Vec::new() });
        open = true;
        cursor = after_name;
        cursor.skip(is_blank);
        cursor.eat_token68();
    }
}

fn keep(challenges: &mut [Challenge], name: &[u8], value: Vec<u8>) {
    let Some(challenge) = challenges.last_mut() else { return };
    // A value that is not text cannot be used in a URL or a form; without it the challenge is judged as it stands.
    if let (true, Ok(value)) = (challenge.parameters.len() < MAX_PARAMETERS, String::from_utf8(value)) {
        challenge.parameters.push((lower(name), value));
    }
}

fn lower(token: &[u8]) -> String {
    token.iter().map(|byte| char::from(byte.to_ascii_lowercase())).collect()
}

fn is_blank(byte: u8) -> bool {
    matches!(byte, b' ' | b'\t')
}

fn is_token(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&byte)
}

/// What is left of a header value.
#[derive(Clone, Copy)]
struct Cursor<'a>(&'a [u8]);

impl<'a> Cursor<'a> {
    fn take(&mut self, wanted: impl Fn(u8) -> bool) -> &'a [u8] {
        let end = self.0.iter().position(|byte| !wanted(*byte)).unwrap_or(self.0.len());
        let (taken, rest) = self.0.split_at(end);
        self.0 = rest;
        taken
    }

    fn skip(&mut self, unwanted: impl Fn(u8) -> bool) {
        self.take(unwanted);
    }

    fn eat(&mut self, byte: u8) -> bool {
        match self.0.split_first() {
            Some((first, rest)) if *first == byte => {
                self.0 = rest;
                true
            }
            _ => false,
        }
    }

    /// Returns a token or an unquoted quoted string; nothing when it is malformed.
    fn value(&mut self) -> Option<Vec<u8>> {
        if !self.eat(b'"') {
            let token = self.take(|byte| !is_blank(byte) && byte != b',' && byte != b'"');
            return (!token.is_empty()).then(|| token.to_vec());
        }
        let mut value = Vec::new();
        loop {
            let (first, rest) = self.0.split_first()?;
            self.0 = rest;
            match first {
                b'"' => return Some(value),
                b'\\' => {
                    let (escaped, rest) = self.0.split_first()?;
                    self.0 = rest;
                    value.push(*escaped);
                }
                byte => value.push(*byte),
            }
        }
    }

    /// Skips to the next comma outside quotes. Takes at least one byte if there is one.
    fn skip_element(&mut self) {
        while let Some(byte) = self.0.first() {
            match byte {
                b',' => return,
                b'"' => drop(self.value()),
                _ => self.0 = &self.0[1..],
            }
        }
    }

    /// Takes a `token68` (the credentials of Negotiate and the like) if one stands before the next comma or the end.
    fn eat_token68(&mut self) {
        let mut ahead = *self;
        let run = ahead.take(|byte| byte.is_ascii_alphanumeric() || b"-._~+/".contains(&byte));
        ahead.skip(|byte| byte == b'=');
        ahead.skip(is_blank);
        if !run.is_empty() && (ahead.0.is_empty() || ahead.0[0] == b',') {
            *self = ahead;
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn all(values: &[&str]) -> Vec<Challenge> {
        parse_values(values.iter().map(|value| value.as_bytes()))
    }

    fn bearer(value: &str) -> BearerDemand {
        match choose(&all(&[value])).unwrap() {
            Demand::Bearer(demand) => demand,
            Demand::Basic => panic!("{value}"),
        }
    }

    #[test]
    fn t104_basic_beside_negotiate_and_bearer_beside_basic() {
        assert_eq!(choose(&all(&["Negotiate", "Basic realm=\"x\""])), Ok(Demand::Basic));
        assert_eq!(choose(&all(&["Negotiate YWJj==, basic"])), Ok(Demand::Basic));
        let both = "Basic realm=\"a, b\", Bearer realm=\"https://a.example/token\",service=\"s\"";
        assert_eq!(bearer(both).realm.as_str(), "https://a.example/token");
        assert_eq!(choose(&all(&["Digest qop=\"auth\"", "Negotiate"])), Err(ChallengeError::NoneKnown));
        assert_eq!(choose(&[]), Err(ChallengeError::NoneKnown));
    }

    #[test]
    fn t105_commas_and_escapes_in_quotes_are_kept() {
        let demand = bearer(
            r#"BEARER Realm = "https://a.example/t?x=1&y=2" , service="a \"b\" \\c",scope="repository:a:pull,push repository:b:pull",scope=c"#,
        );
        assert_eq!(demand.realm.query(), Some("x=1&y=2"));
        assert_eq!(demand.service.as_deref(), Some(r#"a "b" \c"#));
        assert_eq!(demand.scopes, ["repository:a:pull,push", "repository:b:pull", "c"]);
    }

    #[test]
    fn a_value_may_hold_equals_signs_and_colons_unquoted() {
        assert_eq!(bearer("Bearer realm=https://a.example/t?a=b,service=s").realm.query(), Some("a=b"));
    }

    #[test]
    fn bearer_needs_a_realm_unless_basic_is_offered_too() {
        assert_eq!(choose(&all(&["Bearer service=\"s\""])), Err(ChallengeError::BadRealm));
        assert_eq!(choose(&all(&["Bearer realm=\"/token\""])), Err(ChallengeError::BadRealm));
        assert_eq!(choose(&all(&["Bearer realm=\"/token\", Basic"])), Ok(Demand::Basic));
    }

    #[test]
    fn malformed_parts_cost_only_themselves() {
        for text in [
            "Bearer realm=\"https://a.example/t\", =, ;;;, service=\"s\"",
            "\u{7f}, Bearer realm=\"https://a.example/t\",,, service=s",
            "Bearer realm=\"https://a.example/t\" service=\"s\"",
            "Bearer foo=, realm=\"https://a.example/t\", service=\"s\", x=\"unterminated",
        ] {
            assert_eq!(bearer(text).service.as_deref(), Some("s"), "{text}");
        }
    }

    #[test]
    fn caps_hold() {
        let many = "Basic, ".repeat(1000);
        assert_eq!(all(&[&many]).len(), MAX_CHALLENGES);
        let parameters =
            format!("Bearer {}", (0..100).map(|n| format!("p{n}=x")).collect::<Vec<_>>().join(","));
        assert_eq!(all(&[&parameters])[0].parameters.len(), MAX_PARAMETERS);
        assert_eq!(all(&[&"x".repeat(MAX_BYTES + 1), "Basic"]).len(), 1);
    }

    proptest! {
        #[test]
        fn anything_parses_without_panic_and_within_caps(values in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..300), 0..5)) {
            let challenges = parse_values(values.iter().map(Vec::as_slice));
            prop_assert!(challenges.len() <= MAX_CHALLENGES);
            let _ = choose(&challenges);
        }

        #[test]
        fn what_is_written_is_read(scheme in "[A-Za-z]{1,8}", names in prop::collection::vec("[a-z]{1,6}", 1..5), values in prop::collection::vec("[ -~]{0,20}", 5)) {
            let text = names.iter().zip(&values).map(|(name, value)| {
                format!("{name}=\"{}\"", value.replace('\\', r"\\").replace('"', "\\\""))
            }).collect::<Vec<_>>().join(", ");
            let text = format!("{scheme} {text}, Basic");
            let parsed = all(&[&text]);
            let wanted: Vec<_> = names.iter().cloned().zip(values.iter().cloned()).collect();
            prop_assert_eq!(parsed.len(), 2);
            prop_assert_eq!(&parsed[0].scheme, &scheme.to_ascii_lowercase());
            prop_assert_eq!(&parsed[0].parameters, &wanted);
        }
    }
}
