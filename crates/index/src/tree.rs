//! Edits image documents without losing members this program does not know.
//!
//! A document is decoded to a JSON tree, changed, and encoded with the members that OCI defines in the order in which the
//! Go tools write them, empty optional ones left out, and all others after them. Where there are no others the bytes
//! equal those the Go tools write.

use serde::ser::{Serialize, SerializeMap as _, SerializeSeq as _, Serializer};
use serde_json::{Map, Value};
use soci_oci::go_json;
use soci_oci::manifest::{MAX_MANIFEST_SIZE, ManifestError};

/// What an object of a document is: it decides the order of its members.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// An image manifest.
    Manifest,
    /// An image index.
    Index,
    /// A descriptor.
    Descriptor,
    /// A platform.
    Platform,
    /// Anything else: members in the order of their names.
    Other,
}

impl Kind {
    /// Returns the members that OCI defines, in order: name, what it is, whether it is left out when empty.
    fn members(self) -> &'static [(&'static str, Kind, bool)] {
        use Kind::{Descriptor, Other, Platform};
        match self {
            Kind::Manifest => &[
                ("schemaVersion", Other, false),
                ("mediaType", Other, true),
                ("artifactType", Other, true),
                ("config", Descriptor, false),
                ("layers", Descriptor, false),
                ("subject", Descriptor, true),
                ("annotations", Other, true),
            ],
            Kind::Index => &[
                ("schemaVersion", Other, false),
                ("mediaType", Other, true),
                ("artifactType", Other, true),
                ("manifests", Descriptor, false),
                ("subject", Descriptor, true),
                ("annotations", Other, true),
            ],
            Kind::Descriptor => &[
                ("mediaType", Other, false),
                ("digest", Other, false),
                ("size", Other, false),
                ("urls", Other, true),
                ("annotations", Other, true),
                ("data", Other, true),
                ("platform", Platform, true),
                ("artifactType", Other, true),
            ],
            Kind::Platform => &[
                ("architecture", Other, false),
                ("os", Other, false),
                ("os.version", Other, true),
                ("os.features", Other, true),
                ("variant", Other, true),
            ],
            Kind::Other => &[],
        }
    }
}

/// Decodes a manifest or index to a tree.
///
/// # Errors
/// When it is too large, or no JSON object.
pub fn decode(bytes: &[u8]) -> Result<Map<String, Value>, ManifestError> {
    if bytes.len() as u64 > MAX_MANIFEST_SIZE {
        return Err(ManifestError::TooLarge(bytes.len()));
    }
    serde_json::from_slice(bytes).map_err(ManifestError::Malformed)
}

/// Encodes a tree as the Go tools would.
pub fn encode(kind: Kind, tree: &Map<String, Value>) -> Vec<u8> {
    go_json::to_vec(&Object { kind, members: tree }).expect("a JSON tree has string keys only")
}

/// Changes the object member `name` of `tree`, created or put in place of something else if need be.
pub fn edit(tree: &mut Map<String, Value>, name: &str, change: impl FnOnce(&mut Map<String, Value>)) {
    let mut members = match tree.remove(name) {
        Some(Value::Object(members)) => members,
        Some(_) | None => Map::new(),
    };
    change(&mut members);
    tree.insert(name.to_owned(), Value::Object(members));
}

struct Object<'a> {
    kind: Kind,
    members: &'a Map<String, Value>,
}

impl Serialize for Object<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let known = self.kind.members();
        let mut map = serializer.serialize_map(None)?;
        for (name, kind, optional) in known {
            match self.members.get(*name) {
                Some(value) if !(*optional && is_empty(value)) => {
                    map.serialize_entry(name, &Node { kind: *kind, value })?;
                }
                Some(_) | None => {}
            }
        }
        for (name, value) in self.members {
            if !known.iter().any(|(known, ..)| known == name) {
                map.serialize_entry(name, value)?;
            }
        }
        map.end()
    }
}

struct Node<'a> {
    kind: Kind,
    value: &'a Value,
}

impl Serialize for Node<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self.value {
            Value::Object(members) => Object { kind: self.kind, members }.serialize(serializer),
            Value::Array(items) => {
                let mut sequence = serializer.serialize_seq(Some(items.len()))?;
                for value in items {
                    sequence.serialize_element(&Node { kind: self.kind, value })?;
                }
                sequence.end()
            }
            other => other.serialize(serializer),
        }
    }
}

/// Whether Go leaves out an optional member of this value.
fn is_empty(value: &Value) -> bool {
    match value {
        Value::Null => true,
        Value::String(text) => text.is_empty(),
        Value::Array(items) => items.is_empty(),
        Value::Object(members) => members.is_empty(),
        Value::Bool(_) | Value::Number(_) => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn known_members_have_gos_order_and_unknown_ones_survive() {
        let text = b"{\"zz\":[1.5],\"layers\":[{\"size\":1,\"x\":{\"b\":1,\"a\":2},\"digest\":\"d\",\"mediaType\":\"m\",\
            \"annotations\":{}}],\"annotations\":{\"b\":\"<\",\"a\":\"\"},\"config\":{\"digest\":\"c\",\"platform\":\
            {\"os\":\"linux\",\"architecture\":\"amd64\",\"variant\":\"\"}},\"schemaVersion\":2,\"mediaType\":\"\"}";
        let tree = decode(text).unwrap();
        assert_eq!(
            String::from_utf8(encode(Kind::Manifest, &tree)).unwrap(),
            "{\"schemaVersion\":2,\"config\":{\"digest\":\"c\",\"platform\":{\"architecture\":\"amd64\",\"os\":\
             \"linux\"}},\"layers\":[{\"mediaType\":\"m\",\"digest\":\"d\",\"size\":1,\"x\":{\"a\":2,\"b\":1}}],\
             \"annotations\":{\"a\":\"\",\"b\":\"\\u003c\"},\"zz\":[1.5]}"
        );
    }

    #[test]
    fn a_member_of_another_type_is_replaced() {
        let mut tree = decode(b"{\"annotations\":7}").unwrap();
        edit(&mut tree, "annotations", |members| drop(members.insert("a".into(), "b".into())));
        assert_eq!(encode(Kind::Index, &tree), b"{\"annotations\":{\"a\":\"b\"}}");
    }

    #[test]
    fn documents_that_are_no_object_are_errors() {
        for text in [&b"[]"[..], b"", b"1", b"{"] {
            assert!(decode(text).is_err());
        }
        let deep = "[".repeat(100_000);
        assert!(decode(deep.as_bytes()).is_err());
    }
}
