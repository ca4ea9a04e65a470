//! A serde deserializer over a parsed TOML tree that knows where everything stands in the file.
//!
//! Serde hands every struct's field names to the deserializer; this one compares them with the keys in the file. So the
//! structs are the only list of valid keys, and an unknown key is found with its line, its table and its nearest
//! neighbour. Owns nothing of any particular config file, and never touches the file system.

use std::fmt::{self, Display};
use std::ops::Range;

use serde::Deserializer;
use serde::de::value::StrDeserializer;
use serde::de::{
    self, DeserializeOwned, DeserializeSeed, Expected, IntoDeserializer, MapAccess, SeqAccess, Unexpected, Visitor,
};
use serde::forward_to_deserialize_any;
use toml::Spanned;
use toml::de::{DeTable, DeValue};

use super::ConfigError;

/// How alike (0 to 1, Jaro-Winkler) a valid key must be to be suggested.
const LIKENESS_MIN: f64 = 0.75;

/// Parses `text` as `T`; `file` is only the name that errors give.
pub(super) fn parse<T: DeserializeOwned>(file: &str, text: &str) -> Result<T, ConfigError> {
    let table = DeTable::parse(text).map_err(|error| ConfigError::Syntax {
        file: file.to_owned(),
        line: line_of(text, error.span().map_or(0, |span| span.start)),
        message: one_line(error.message()),
    })?;
    let span = table.span();
    let root = Spanned::new(span, DeValue::Table(table.into_inner()));
    T::deserialize(Node(&root)).map_err(|fault| fault.into_config_error(file, text))
}

/// Line of byte `offset` in `text`, from 1.
fn line_of(text: &str, offset: usize) -> usize {
    let before = &text.as_bytes()[..offset.min(text.len())];
    1 + before.iter().filter(|byte| **byte == b'\n').count()
}

/// `text` with line breaks and other control characters escaped: what a file holds must not forge lines of a log.
fn one_line(text: &str) -> String {
    let mut line = String::with_capacity(text.len());
    for c in text.chars() {
        if c.is_control() {
            line.extend(c.escape_debug());
        } else {
            line.push(c);
        }
    }
    line
}

/// One step on the way from the top of the file to a value.
#[derive(Debug)]
enum Step {
    Key(String),
    /// An element of an array, by its `name` if it has one.
    Element {
        index: usize,
        name: Option<String>,
    },
}

/// What is wrong, before it is put into words.
#[derive(Debug)]
enum FaultKind {
    UnknownKey { key: String, valid: &'static [&'static str] },
    MissingKey(&'static str),
    Value(String),
}

/// A fault on its way up the tree; each level adds where it was found.
#[derive(Debug)]
struct Fault {
    kind: FaultKind,
    /// Bytes of the innermost value concerned.
    span: Option<Range<usize>>,
    /// Innermost step first.
    steps: Vec<Step>,
}

impl Fault {
    fn new(kind: FaultKind) -> Fault {
        Fault { kind, span: None, steps: Vec::new() }
    }

    fn at(mut self, span: Range<usize>) -> Fault {
        self.span.get_or_insert(span);
        self
    }

    fn under(mut self, step: Step) -> Fault {
        self.steps.push(step);
        self
    }

    /// The path in words: `volume "vol0", replica #2, address`.
    fn place(&self) -> String {
        let mut place = String::new();
        for step in self.steps.iter().rev() {
            match step {
                Step::Key(key) if place.is_empty() => place.push_str(key),
                Step::Key(key) => {
                    place.push_str(", ");
                    place.push_str(key);
                }
                Step::Element { name: Some(name), .. } => place.push_str(&format!(" {name:?}")),
                Step::Element { index, name: None } => {
                    place.push_str(&format!(" #{}", index + 1));
                }
            }
        }
        place
    }

    /// The path as the place of a key: `in [nbd]`, `in volume "vol0"`.
    fn table(&self) -> String {
        match self.steps.as_slice() {
            [] => "at the top level".to_owned(),
            [Step::Key(key)] => format!("in [{key}]"),
            [..] => format!("in {}", self.place()),
        }
    }

    fn into_config_error(self, file: &str, text: &str) -> ConfigError {
        let line = line_of(text, self.span.as_ref().map_or(0, |span| span.start));
        let (table, place) = (one_line(&self.table()), one_line(&self.place()));
        let file = file.to_owned();
        match self.kind {
            FaultKind::UnknownKey { key, valid } => ConfigError::UnknownKey {
                nearest: nearest(&key, valid).map(str::to_owned),
                file,
                line,
                table,
                key: one_line(&key),
                valid,
            },
            FaultKind::MissingKey(key) => ConfigError::MissingKey { file, line, table, key },
            FaultKind::Value(message) => ConfigError::Value { file, line, place, message: one_line(&message) },
        }
    }
}

/// The valid key most like `key`, if any is like enough.
fn nearest(key: &str, valid: &[&'static str]) -> Option<&'static str> {
    valid
        .iter()
        .map(|candidate| (strsim::jaro_winkler(key, candidate), *candidate))
        .filter(|(likeness, _)| *likeness >= LIKENESS_MIN)
        .max_by(|a, b| a.0.total_cmp(&b.0))
        .map(|(_, candidate)| candidate)
}

impl Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.kind {
            FaultKind::UnknownKey { key, .. } => write!(f, "unknown key `{key}`"),
            FaultKind::MissingKey(key) => write!(f, "missing key `{key}`"),
            FaultKind::Value(message) => f.write_str(message),
        }
    }
}

impl std::error::Error for Fault {}

impl de::Error for Fault {
    fn custom<T: Display>(message: T) -> Fault {
        Fault::new(FaultKind::Value(message.to_string()))
    }

    fn missing_field(field: &'static str) -> Fault {
        Fault::new(FaultKind::MissingKey(field))
    }

    fn invalid_type(found: Unexpected<'_>, expected: &dyn Expected) -> Fault {
        Fault::custom(format_args!("found {found}, expected {expected}"))
    }

    fn invalid_value(found: Unexpected<'_>, expected: &dyn Expected) -> Fault {
        Fault::custom(format_args!("found {found}, expected {expected}"))
    }

    fn unknown_variant(variant: &str, expected: &'static [&'static str]) -> Fault {
        let choices: Vec<String> = expected.iter().map(|e| format!("{e:?}")).collect();
        Fault::custom(format_args!("{variant:?} is not possible here; choose one of {}", choices.join(", ")))
    }
}

/// One value of the tree.
#[derive(Clone, Copy)]
struct Node<'t, 'i>(&'t Spanned<DeValue<'i>>);

impl Node<'_, '_> {
    /// The value's own `name`, by which messages call an element of an array of tables.
    fn name(&self) -> Option<String> {
        let DeValue::Table(table) = self.0.get_ref() else {
            return None;
        };
        let name = table.get("name")?.get_ref().as_str()?;
        Some(name.to_owned())
    }
}

impl<'de> Deserializer<'de> for Node<'_, '_> {
    type Error = Fault;

    fn deserialize_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Fault> {
        match self.0.get_ref() {
            DeValue::String(text) => visitor.visit_str(text),
            DeValue::Boolean(value) => visitor.visit_bool(*value),
            DeValue::Integer(integer) => match i128::from_str_radix(integer.as_str(), integer.radix()) {
                Ok(value) => visit_integer(value, visitor),
                Err(_) => Err(de::Error::custom("this number is too large")),
            },
            DeValue::Float(float) => match float.as_str().parse() {
                Ok(value) => visitor.visit_f64(value),
                Err(_) => Err(de::Error::custom("this number cannot be read")),
            },
            DeValue::Datetime(date) => visitor.visit_str(&date.to_string()),
            DeValue::Array(elements) => visitor.visit_seq(Elements { rest: elements.iter().enumerate() }),
            DeValue::Table(table) => visitor.visit_map(Entries { rest: table.iter(), value: None }),
        }
        .map_err(|fault: Fault| fault.at(self.0.span()))
    }

    fn deserialize_struct<V: Visitor<'de>>(
        self,
        _name: &'static str,
        fields: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, Fault> {
        if let DeValue::Table(table) = self.0.get_ref()
            && let Some(key) = table.keys().find(|key| !fields.contains(&&**key.get_ref()))
        {
            return Err(
                Fault::new(FaultKind::UnknownKey { key: key.get_ref().to_string(), valid: fields }).at(key.span())
            );
        }
        self.deserialize_any(visitor)
    }

    fn deserialize_option<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Fault> {
        visitor.visit_some(self)
    }

    fn deserialize_newtype_struct<V: Visitor<'de>>(self, _name: &'static str, visitor: V) -> Result<V::Value, Fault> {
        visitor.visit_newtype_struct(self)
    }

    fn deserialize_enum<V: Visitor<'de>>(
        self,
        _name: &'static str,
        variants: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, Fault> {
        match self.0.get_ref().as_str() {
            Some(text) => {
                let variant: StrDeserializer<'_, Fault> = text.into_deserializer();
                visitor.visit_enum(variant)
            }
            None => Err(de::Error::unknown_variant(self.0.get_ref().type_str(), variants)),
        }
        .map_err(|fault: Fault| fault.at(self.0.span()))
    }

    forward_to_deserialize_any! {
        bool i8 i16 i32 i64 i128 u8 u16 u32 u64 u128 f32 f64 char str string bytes byte_buf unit unit_struct
        seq tuple tuple_struct map identifier ignored_any
    }
}

/// Gives a number to the visitor in the smallest type that serde's own visitors understand.
fn visit_integer<'de, V: Visitor<'de>>(value: i128, visitor: V) -> Result<V::Value, Fault> {
    if let Ok(value) = u64::try_from(value) {
        visitor.visit_u64(value)
    } else if let Ok(value) = i64::try_from(value) {
        visitor.visit_i64(value)
    } else {
        visitor.visit_i128(value)
    }
}

struct Elements<'t, 'i> {
    rest: std::iter::Enumerate<std::slice::Iter<'t, Spanned<DeValue<'i>>>>,
}

impl<'de> SeqAccess<'de> for Elements<'_, '_> {
    type Error = Fault;

    fn next_element_seed<S: DeserializeSeed<'de>>(&mut self, seed: S) -> Result<Option<S::Value>, Fault> {
        let Some((index, value)) = self.rest.next() else {
            return Ok(None);
        };
        let node = Node(value);
        let located = |fault: Fault| {
            let name = node.name();
            fault.at(value.span()).under(Step::Element { index, name })
        };
        seed.deserialize(node).map(Some).map_err(located)
    }
}

type Entry<'t, 'i> = (&'t Spanned<std::borrow::Cow<'i, str>>, &'t Spanned<DeValue<'i>>);

struct Entries<'t, 'i, I: Iterator<Item = Entry<'t, 'i>>>
where
    'i: 't,
{
    rest: I,
    value: Option<Entry<'t, 'i>>,
}

impl<'de, 't, 'i: 't, I: Iterator<Item = Entry<'t, 'i>>> MapAccess<'de> for Entries<'t, 'i, I> {
    type Error = Fault;

    fn next_key_seed<S: DeserializeSeed<'de>>(&mut self, seed: S) -> Result<Option<S::Value>, Fault> {
        self.value = self.rest.next();
        let Some((key, _)) = self.value else {
            return Ok(None);
        };
        let text: StrDeserializer<'_, Fault> = (&**key.get_ref()).into_deserializer();
        seed.deserialize(text).map(Some)
    }

    fn next_value_seed<S: DeserializeSeed<'de>>(&mut self, seed: S) -> Result<S::Value, Fault> {
        let Some((key, value)) = self.value.take() else {
            return Err(de::Error::custom("a value was asked for before its key"));
        };
        seed.deserialize(Node(value))
            .map_err(|fault| fault.at(value.span()).under(Step::Key(key.get_ref().to_string())))
    }
}
