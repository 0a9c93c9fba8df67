//! Describes configuration tables once: the struct, its keys, their defaults, and what each does.
//!
//! `tables!` makes from one list a struct that serde fills and the description that the reader, `config dump` and the
//! documentation use, so that they cannot disagree.

/// One key of a table.
#[derive(Debug)]
pub struct Key {
    /// As it is written in the file.
    pub name: &'static str,
    /// What it does, for the documentation.
    pub effect: &'static str,
    /// Whether it does that here.
    pub support: Support,
    /// What may stand there.
    pub kind: Kind,
    /// What holds when it is absent; nothing where that follows from another key.
    pub default: fn() -> Option<toml::Value>,
}

/// Whether a key has an effect in this daemon.
#[derive(Debug, Clone, Copy)]
pub enum Support {
    /// It has.
    Used,
    /// It is known and checked, but without effect, because of this.
    Unused(&'static str),
}

/// What may stand at a key.
#[derive(Debug, Clone, Copy)]
pub enum Kind {
    /// A value, of this type.
    Value(&'static str),
    /// A table with these keys.
    Table(fn() -> &'static [Key]),
    /// A table of free keys, each a table with these keys.
    Map(fn() -> &'static [Key]),
    /// A list of tables with these keys.
    List(fn() -> &'static [Key]),
}

/// A type that stands at a key.
pub trait Kinded {
    /// What it is in the file.
    const KIND: Kind;
}

/// A struct whose fields are keys.
pub trait Table {
    /// Its keys, in the order of the reference's sample file.
    fn keys() -> &'static [Key];
}

macro_rules! values {
    ($($type:ty = $name:literal),*) => { $(impl Kinded for $type { const KIND: Kind = Kind::Value($name); })* };
}
values!(bool = "true or false", i64 = "integer", String = "string", Vec<String> = "list of strings");

impl Kinded for Option<i64> {
    const KIND: Kind = Kind::Value("integer");
}

impl<T: Table> Kinded for std::collections::BTreeMap<String, T> {
    const KIND: Kind = Kind::Map(T::keys);
}

impl<T: Table> Kinded for Vec<T> {
    const KIND: Kind = Kind::List(T::keys);
}

macro_rules! tables {
    ($($(#[doc = $about:literal])+ $name:ident {
        $($(#[doc = $effect:literal])+ $key:literal $field:ident: $type:ty = $default:expr, $support:expr;)*
    })*) => { $(
        $(#[doc = $about])+
        #[derive(Debug, Clone, PartialEq, serde::Serialize, serde::Deserialize)]
        #[serde(default)]
        pub struct $name {
            $($(#[doc = $effect])+ #[serde(rename = $key)] pub $field: $type,)*
        }

        impl Default for $name {
            fn default() -> Self {
                Self { $($field: $default,)* }
            }
        }

        impl $crate::config::schema::Table for $name {
            fn keys() -> &'static [$crate::config::schema::Key] {
                const { &[$($crate::config::schema::Key {
                    name: $key,
                    effect: concat!($($effect),+),
                    support: $support,
                    kind: <$type as $crate::config::schema::Kinded>::KIND,
                    default: || {
                        let value: $type = $default;
                        toml::Value::try_from(value).ok()
                    },
                },)*] }
            }
        }

        impl $crate::config::schema::Kinded for $name {
            const KIND: $crate::config::schema::Kind =
                $crate::config::schema::Kind::Table(<$name as $crate::config::schema::Table>::keys);
        }
    )* };
}
pub(crate) use tables;
