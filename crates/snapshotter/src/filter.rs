//! containerd's filter expressions, as `List` takes them.
//!
//! A filter is a comma-separated list of selectors that must all hold; of several filters any may hold. A selector is a
//! field path, alone (the field is present) or with `==`, `!=` or `~=` and a value. Fields and values may be quoted with
//! `"`; the value of `~=` also with `/` or `|`, so that a regular expression needs no doubled backslashes. containerd
//! itself asks such a filter after each Prepare that answers "already exists", so a difference here fails pulls.

use std::collections::BTreeMap;

use regex::Regex;

use crate::records::Kind;
use crate::{Code, Error};

/// The longest filter accepted, in bytes: chain ids, names and labels are far shorter.
const MAX_LEN: usize = 64 << 10;
/// The largest program a regular expression may become, in bytes.
const MAX_REGEX: usize = 1 << 20;

/// A parsed list of filters.
#[derive(Debug, Clone)]
pub struct Filter(Vec<Vec<Selector>>);

/// What filters can ask of a snapshot, borrowed: all snapshots of a node are looked at for each layer of a pull.
#[derive(Debug, Clone, Copy)]
pub struct Subject<'a> {
    /// Its name, or key while it is not committed.
    pub name: &'a str,
    /// Name of the snapshot it builds on.
    pub parent: Option<&'a str>,
    /// What it is for.
    pub kind: Kind,
    /// Its labels.
    pub labels: &'a BTreeMap<String, String>,
}

#[derive(Debug, Clone)]
struct Selector {
    field: Field,
    test: Test,
}

#[derive(Debug, Clone)]
enum Field {
    Name,
    Parent,
    Kind,
    Label(String),
    /// Of nothing that a snapshot has: never present.
    Unknown,
}

#[derive(Debug, Clone)]
enum Test {
    Present,
    Equal(String),
    NotEqual(String),
    /// `None` when the expression does not compile: such a selector never holds.
    Matches(Option<Regex>),
}

impl Filter {
    /// Parses `filters`; none at all, or an empty one, matches everything.
    ///
    /// # Errors
    /// [`Code::InvalidArgument`] with the place where the grammar is broken.
    pub fn parse<S: AsRef<str>>(filters: &[S]) -> Result<Self, Error> {
        filters
            .iter()
            .map(|filter| Parser::new(filter.as_ref())?.selectors())
            .collect::<Result<_, _>>()
            .map(Self)
    }

    /// Whether `subject` is selected.
    pub fn matches(&self, subject: &Subject<'_>) -> bool {
        self.0.is_empty()
            || self.0.iter().any(|selectors| selectors.iter().all(|selector| selector.holds(subject)))
    }
}

impl Selector {
    fn holds(&self, subject: &Subject<'_>) -> bool {
        let value = self.field.of(subject);
        match &self.test {
            Test::Present => value.is_some(),
            Test::Equal(wanted) => value == Some(wanted.as_str()),
            Test::NotEqual(unwanted) => value.unwrap_or_default() != unwanted,
            Test::Matches(regex) => {
                regex.as_ref().is_some_and(|regex| regex.is_match(value.unwrap_or_default()))
            }
        }
    }
}

impl Field {
    fn at(path: &[String]) -> Self {
        match path.split_first().map(|(first, rest)| (first.as_str(), rest)) {
            Some(("name", _)) => Self::Name,
            Some(("parent", _)) => Self::Parent,
            Some(("kind", _)) => Self::Kind,
            Some(("labels", rest)) => Self::Label(rest.join(".")),
            _ => Self::Unknown,
        }
    }

    fn of<'a>(&self, subject: &Subject<'a>) -> Option<&'a str> {
        match self {
            Self::Name => Some(subject.name),
            Self::Parent => Some(subject.parent.unwrap_or_default()),
            Self::Kind => Some(match subject.kind {
                Kind::View => "view",
                Kind::Active => "active",
                Kind::Committed => "committed",
            }),
            Self::Label(label) => subject.labels.get(label).map(String::as_str),
            Self::Unknown => None,
        }
    }
}

struct Parser<'a> {
    input: &'a str,
    at: usize,
}

impl<'a> Parser<'a> {
    fn new(input: &'a str) -> Result<Self, Error> {
        if input.len() > MAX_LEN {
            let message = format!("filter of {} bytes is longer than the limit of {MAX_LEN}", input.len());
            return Err(Error::new(Code::InvalidArgument, message));
        }
        Ok(Self { input, at: 0 })
    }

    fn error(&self, what: &str) -> Error {
        let (before, after) = self.input.split_at(self.at.min(self.input.len()));
        Error::new(Code::InvalidArgument, format!("filters: parse error: [{before} >|{after}|<]: {what}"))
    }

    fn peek(&self) -> Option<char> {
        self.input.get(self.at..)?.chars().next()
    }

    fn next(&mut self) -> Option<char> {
        let character = self.peek()?;
        self.at += character.len_utf8();
        Some(character)
    }

    fn skip_space(&mut self) {
        while self.peek().is_some_and(char::is_whitespace) {
            self.next();
        }
    }

    fn while_true(&mut self, accept: impl Fn(char) -> bool) -> &'a str {
        let start = self.at;
        while self.peek().is_some_and(&accept) {
            self.next();
        }
        &self.input[start..self.at]
    }

    fn selectors(mut self) -> Result<Vec<Selector>, Error> {
        let mut selectors = Vec::new();
        if self.input.is_empty() {
            return Ok(selectors);
        }
        loop {
            selectors.push(self.selector()?);
            match self.peek() {
                None => return Ok(selectors),
                Some(',') => {
                    self.next();
                }
                Some(_) => return Err(self.error("unexpected input")),
            }
        }
    }

    fn selector(&mut self) -> Result<Selector, Error> {
        let mut path = vec![self.field()?];
        while self.peek() == Some('.') {
            self.next();
            path.push(self.field()?);
        }
        let field = Field::at(&path);
        if matches!(self.peek(), None | Some(',')) {
            return Ok(Selector { field, test: Test::Present });
        }
        self.skip_space();
        let operator = self.while_true(|character| matches!(character, '=' | '!' | '~'));
        let test = match operator {
            "==" => Test::Equal(self.value(false)?),
            "!=" => Test::NotEqual(self.value(false)?),
            "~=" => Test::Matches(compile(&self.value(true)?)),
            _ => return Err(self.error("expected an operator (\"==\"|\"!=\"|\"~=\")")),
        };
        Ok(Selector { field, test })
    }

    fn field(&mut self) -> Result<String, Error> {
        self.skip_space();
        if self.peek() == Some('"') {
            return self.quoted();
        }
        let field = self.while_true(|character| character == '_' || character.is_ascii_alphanumeric());
        if field.is_empty() { Err(self.error("expected field or quoted")) } else { Ok(field.to_owned()) }
    }

    fn value(&mut self, other_quotes: bool) -> Result<String, Error> {
        self.skip_space();
        match self.peek() {
            Some('"') => return self.quoted(),
            Some('/' | '|') if other_quotes => return self.quoted(),
            Some('/' | '|') => return Err(self.error("invalid quote encountered")),
            Some('.' | ',' | '=' | '!' | '~') | None => return Err(self.error("expected value or quoted")),
            Some(_) => {}
        }
        let value = self.while_true(|character| {
            character != ',' && !character.is_whitespace() && !character.is_control()
        });
        if value.is_empty() { Err(self.error("expected value or quoted")) } else { Ok(value.to_owned()) }
    }

    /// A literal with Go's escapes, between the quote at the present place and the next one like it.
    fn quoted(&mut self) -> Result<String, Error> {
        let quote = self.next().ok_or_else(|| self.error("expected value or quoted"))?;
        // An escape may name single bytes, so that the text becomes valid only as a whole.
        let mut text = Vec::new();
        loop {
            match self.next() {
                None | Some('\n') => return Err(self.error("quoted literal not terminated")),
                Some(character) if character == quote => {
                    return String::from_utf8(text).map_err(|_| self.error("quoted literal is not UTF-8"));
                }
                Some('\\') => self.escape(quote, &mut text)?,
                Some(character) => push(&mut text, character),
            }
        }
    }

    fn escape(&mut self, quote: char, text: &mut Vec<u8>) -> Result<(), Error> {
        let illegal = "illegal escape sequence";
        let simple = match self.next().ok_or_else(|| self.error("quoted literal not terminated"))? {
            'a' => 7,
            'b' => 8,
            'f' => 12,
            'n' => b'\n',
            'r' => b'\r',
            't' => b'\t',
            'v' => 11,
            '\\' => b'\\',
            'x' => u8::try_from(self.digits(16, 2)?).map_err(|_| self.error(illegal))?,
            'u' => return self.code_point(4, text),
            'U' => return self.code_point(8, text),
            first @ '0'..='7' => {
                self.at -= first.len_utf8();
                u8::try_from(self.digits(8, 3)?).map_err(|_| self.error(illegal))?
            }
            character if character == quote => {
                push(text, character);
                return Ok(());
            }
            _ => return Err(self.error(illegal)),
        };
        text.push(simple);
        Ok(())
    }

    fn code_point(&mut self, digits: usize, text: &mut Vec<u8>) -> Result<(), Error> {
        let character = char::from_u32(self.digits(16, digits)?);
        push(text, character.ok_or_else(|| self.error("illegal escape sequence"))?);
        Ok(())
    }

    fn digits(&mut self, base: u32, count: usize) -> Result<u32, Error> {
        let mut value: u32 = 0;
        for _ in 0..count {
            let digit = self.next().and_then(|character| character.to_digit(base));
            let digit = digit.ok_or_else(|| self.error("illegal numeric escape sequence"))?;
            value = value.wrapping_mul(base) | digit;
        }
        Ok(value)
    }
}

fn push(text: &mut Vec<u8>, character: char) {
    text.extend_from_slice(character.encode_utf8(&mut [0; 4]).as_bytes());
}

fn compile(expression: &str) -> Option<Regex> {
    match regex::RegexBuilder::new(expression).size_limit(MAX_REGEX).build() {
        Ok(regex) => Some(regex),
        Err(error) => {
            tracing::warn!(%error, "a filter's regular expression does not compile and selects nothing");
            None
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn selects(filter: &Filter) -> bool {
        let labels = [
            ("containerd.io/snapshot.ref", "sha256:aa"),
            ("plain", "a/b c"),
            ("empty", ""),
            ("a.b", "dotted"),
        ];
        filter.matches(&Subject {
            name: "k8s.io/3/sha256:aa",
            parent: Some("k8s.io/2/sha256:bb"),
            kind: Kind::Committed,
            labels: &labels.map(|(key, value)| (key.to_owned(), value.to_owned())).into(),
        })
    }

    fn matches(filters: &[&str]) -> bool {
        selects(&Filter::parse(filters).unwrap_or_else(|error| panic!("{filters:?}: {error}")))
    }

    #[test]
    fn the_filter_containerd_sends_after_already_exists() {
        let filter = r#"labels."containerd.io/snapshot.ref"==sha256:aa,parent=="k8s.io/2/sha256:bb""#;
        assert!(matches(&[filter]));
        assert!(!matches(&[&filter.replace("bb", "cc")]));
    }

    #[test]
    fn selectors() {
        for (filter, expected) in [
            ("", true),
            ("name", true),
            ("labels", false),
            ("nonsense", false),
            ("labels.plain", true),
            ("labels.absent", false),
            ("labels.absent!=x", true),
            ("labels.absent!=\"\"", false),
            ("labels.absent==\"\"", false),
            ("labels.empty==\"\"", true),
            ("labels.a.b==dotted", true),
            ("labels.\"a.b\"==dotted", true),
            ("kind==committed", true),
            ("kind==Committed", false),
            ("kind!=active", true),
            ("name==k8s.io/3/sha256:aa", true),
            ("name~=^k8s", true),
            ("name~=/sha256:(aa|cc)$/", true),
            ("name~=|/3/|", true),
            ("name~=\"\\\\d/\"", true),
            ("name~=/(/", false),
            ("labels.plain==\"a/b c\"", true),
            ("labels.plain==\"\\x61/b\\u0020c\"", true),
            ("labels.plain==\"\\141/b c\"", true),
            ("kind==committed,name~=k8s", true),
            ("kind==committed,name~=other", false),
            ("kind == committed", true),
        ] {
            assert_eq!(matches(&[filter]), expected, "{filter}");
        }
    }

    #[test]
    fn several_filters_are_alternatives() {
        assert!(matches(&["kind==active", "kind==committed"]));
        assert!(!matches(&["kind==active", "kind==view"]));
        assert!(matches(&[]));
    }

    #[test]
    fn broken_grammar_is_an_invalid_argument() {
        for filter in [
            ",",
            "name,",
            "name==",
            "name=x",
            "name===x",
            "==x",
            "name==\"x",
            "name==/x/",
            "name==x y",
            ".name",
            "name.",
            "name==\"\\q\"",
            "name==\"\\xg\"",
            "name==\"\\ud800\"",
            "name==\"\\xff\"",
            "name~=\"\n\"",
            "name==\"\\777\"",
        ] {
            let error = Filter::parse(&[filter]).err().unwrap_or_else(|| panic!("{filter:?} was accepted"));
            assert_eq!(error.code(), Code::InvalidArgument, "{filter}");
        }
        assert!(Filter::parse(&["a".repeat(MAX_LEN + 1)]).is_err());
    }

    proptest::proptest! {
        #[test]
        fn no_input_panics(filter in "\\PC{0,40}") {
            if let Ok(filter) = Filter::parse(&[filter]) {
                selects(&filter);
            }
        }
    }
}
