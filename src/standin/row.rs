//! How a record becomes a row: columns, ingestion mappings, and what each type makes of a JSON value.
//!
//! Before it: [`super::engine`] kept a record's text. After it: the row as JSON, when somebody asks for it.
//! Thread: any. Allocates: per row that is looked at.
//! Invariant: a value that does not fit its column is null and the row stays; numbers and strings within `dynamic` are the
//! record's own bytes.
//! Not here: encoding policies that raise the limits; transforms; columns made by a mapping.
//!
//! Source: Kusto documentation, "JSON mapping", "The dynamic data type", "Encoding policy".

use std::collections::HashMap;
use std::sync::Arc;

use serde::Deserialize;
use serde_json::Value;
use serde_json::value::RawValue;

/// A `dynamic` value that is larger becomes null, and a `string` is cut, without an error.
pub(super) const VALUE_SIZE_MAX: usize = 1 << 20;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Type {
    Bool,
    Datetime,
    Decimal,
    Dynamic,
    Guid,
    Int,
    Long,
    Real,
    String,
    Timespan,
}

const TYPES: &[(&str, Type)] = &[
    ("bool", Type::Bool),
    ("datetime", Type::Datetime),
    ("decimal", Type::Decimal),
    ("dynamic", Type::Dynamic),
    ("guid", Type::Guid),
    ("int", Type::Int),
    ("long", Type::Long),
    ("real", Type::Real),
    ("string", Type::String),
    ("timespan", Type::Timespan),
];

/// A column of a table.
#[derive(Debug, Clone)]
pub(super) struct Column {
    pub name: String,
    kind: Type,
}

impl Column {
    pub fn new(name: &str, kind: &str) -> Result<Column, String> {
        let kind = TYPES.iter().find(|(name, _)| *name == kind);
        let (_, kind) = kind.ok_or_else(|| format!("column {name}: there is no such type"))?;
        Ok(Column {
            name: name.into(),
            kind: *kind,
        })
    }

    pub fn kind_name(&self) -> &'static str {
        let found = TYPES.iter().find(|(_, kind)| *kind == self.kind);
        found.map_or("", |(name, _)| name)
    }
}

#[derive(Debug)]
enum Origin {
    /// Keys and indices below the record.
    Path(Vec<String>),
    Constant(String),
}

/// An ingestion mapping of kind `Json`, checked against the columns of its table.
#[derive(Debug)]
pub(super) struct Mapping {
    /// (index of the column, where its value comes from).
    elements: Vec<(usize, Origin)>,
}

#[derive(Deserialize)]
struct Element {
    #[serde(alias = "Column")]
    column: String,
    #[serde(default, alias = "properties")]
    #[serde(rename = "Properties")]
    properties: Properties,
}

#[derive(Deserialize, Default)]
struct Properties {
    #[serde(default, rename = "Path", alias = "path")]
    path: Option<String>,
    #[serde(default, rename = "ConstValue", alias = "constValue")]
    constant: Option<String>,
    #[serde(default, rename = "Transform", alias = "transform")]
    transform: Option<String>,
}

impl Mapping {
    pub fn parse(text: &str, columns: &[Column]) -> Result<Mapping, String> {
        let parsed: Vec<Element> = serde_json::from_str(text)
            .map_err(|error| format!("the mapping is not readable: {error}"))?;
        let mut elements: Vec<(usize, Origin)> = Vec::new();
        for element in parsed {
            let name = element.column;
            let column = columns.iter().position(|column| column.name == name);
            let column = column
                .ok_or_else(|| format!("the mapping has a column that the table lacks: {name}"))?;
            if elements.iter().any(|(other, _)| *other == column) {
                return Err(format!(
                    "the mapping has two elements for the column {name}"
                ));
            }
            let properties = element.properties;
            if let Some(transform) = properties.transform {
                return Err(format!("the stand-in plays no transforms: {transform}"));
            }
            let origin = match (properties.path, properties.constant) {
                (Some(path), None) if path.starts_with('$') => Origin::Path(steps(&path)?),
                (Some(constant), None) | (None, Some(constant)) => Origin::Constant(constant),
                _ => return Err(format!("the element of {name} needs Path or ConstValue")),
            };
            elements.push((column, origin));
        }
        Ok(Mapping { elements })
    }
}

/// `$.a['b c'][0]` as `a`, `b c`, `0`.
fn steps(path: &str) -> Result<Vec<String>, String> {
    let bad = || format!("the path is not of the form $.a.b or $['a']: {path}");
    let mut steps = Vec::new();
    let mut rest = &path[1..];
    while !rest.is_empty() {
        rest = match rest.strip_prefix('.') {
            Some(after) if after.starts_with('[') => after,
            Some(after) => {
                let end = after.find(['.', '[']).unwrap_or(after.len());
                if end == 0 {
                    return Err(bad());
                }
                steps.push(after[..end].to_owned());
                rest = &after[end..];
                continue;
            }
            None => rest,
        };
        let inner = rest.strip_prefix('[').ok_or_else(bad)?;
        let (step, after) = match inner.chars().next() {
            Some(quote @ ('\'' | '"')) => inner[1..].split_once(&format!("{quote}]")),
            _ => inner.split_once(']'),
        }
        .ok_or_else(bad)?;
        steps.push(step.to_owned());
        rest = after;
    }
    Ok(steps)
}

/// The columns and the mapping that a record was ingested with.
#[derive(Debug, Clone)]
pub(super) struct Shape {
    pub columns: Arc<[Column]>,
    /// Without one, properties go to the columns of their names.
    pub mapping: Option<Arc<Mapping>>,
}

/// A row, and how many of its values were too large.
pub(super) struct Row {
    /// A JSON object with a property per column, in their order.
    pub text: String,
    pub nulled_count: u64,
}

impl Shape {
    /// Makes the row of a record, which is valid JSON.
    pub fn row(&self, record: &[u8]) -> Row {
        // Kusto puts U+FFFD where a record is not UTF-8.
        let record = String::from_utf8_lossy(record);
        let top = object(&record);
        let mut row = Row {
            text: String::from("{"),
            nulled_count: 0,
        };
        for (index, column) in self.columns.iter().enumerate() {
            let origin = self.mapping.as_ref().map(|mapping| {
                let element = mapping.elements.iter().find(|(column, _)| *column == index);
                element.map(|(_, origin)| origin)
            });
            let value = match origin {
                None => top.get(&column.name).map(|value| value.get().to_owned()),
                Some(None) => None,
                Some(Some(Origin::Constant(constant))) => {
                    Some(Value::from(constant.as_str()).to_string())
                }
                Some(Some(Origin::Path(steps))) => match steps.split_first() {
                    None => Some(record.trim().to_owned()),
                    Some((first, rest)) => {
                        top.get(first).and_then(|value| descend(value.get(), rest))
                    }
                },
            };
            if index > 0 {
                row.text.push(',');
            }
            row.text += &Value::from(column.name.as_str()).to_string();
            row.text.push(':');
            row.text += &column.convert(value.as_deref(), &mut row.nulled_count);
        }
        row.text.push('}');
        row
    }
}

fn object(text: &str) -> HashMap<String, &RawValue> {
    serde_json::from_str(text).unwrap_or_default()
}

fn descend(text: &str, steps: &[String]) -> Option<String> {
    let Some((first, rest)) = steps.split_first() else {
        return Some(text.to_owned());
    };
    if let (true, Ok(index)) = (text.starts_with('['), first.parse::<usize>()) {
        let elements: Vec<&RawValue> = serde_json::from_str(text).ok()?;
        return descend(elements.get(index)?.get(), rest);
    }
    descend(object(text).get(first)?.get(), rest)
}

impl Column {
    /// The JSON text of the column's value.
    fn convert(&self, value: Option<&str>, nulled_count: &mut u64) -> String {
        let null = || "null".to_owned();
        let Some(value) = value.filter(|value| *value != "null") else {
            // A string has no null in Kusto.
            return if self.kind == Type::String {
                "\"\"".into()
            } else {
                null()
            };
        };
        let string: Option<String> = serde_json::from_str(value).ok();
        let plain = string.as_deref().unwrap_or(value);
        let fits = match self.kind {
            Type::Dynamic => {
                let fits = value.len() <= VALUE_SIZE_MAX;
                *nulled_count += u64::from(!fits);
                fits
            }
            Type::String => {
                let mut size = plain.len().min(VALUE_SIZE_MAX);
                while !plain.is_char_boundary(size) {
                    size -= 1;
                }
                return Value::from(&plain[..size]).to_string();
            }
            Type::Datetime => string.as_deref().is_some_and(is_datetime),
            Type::Bool => {
                return plain
                    .parse::<bool>()
                    .map_or_else(|_| null(), |value| value.to_string());
            }
            Type::Int => {
                return plain
                    .parse::<i32>()
                    .map_or_else(|_| null(), |value| value.to_string());
            }
            Type::Long => {
                return plain
                    .parse::<i64>()
                    .map_or_else(|_| null(), |value| value.to_string());
            }
            Type::Real | Type::Decimal => {
                return match serde_json::from_str::<serde_json::Number>(plain) {
                    Ok(_) => plain.to_owned(),
                    Err(_) => null(),
                };
            }
            Type::Guid => plain.parse::<uuid::Uuid>().is_ok(),
            Type::Timespan => string.is_some(),
        };
        if fits { value.to_owned() } else { null() }
    }
}

/// ISO 8601 with a zone, or without one (then it is UTC), or a date alone.
fn is_datetime(text: &str) -> bool {
    text.parse::<jiff::Timestamp>().is_ok()
        || text.parse::<jiff::civil::DateTime>().is_ok()
        || text.parse::<jiff::civil::Date>().is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shape(columns: &[(&str, &str)], mapping: Option<&str>) -> Shape {
        let columns: Arc<[Column]> = columns
            .iter()
            .map(|(name, kind)| Column::new(name, kind).unwrap())
            .collect();
        let mapping = mapping.map(|text| Arc::new(Mapping::parse(text, &columns).unwrap()));
        Shape { columns, mapping }
    }

    #[test]
    fn properties_go_to_columns_of_the_same_case() {
        let shape = shape(&[("a", "long"), ("B", "string"), ("c", "dynamic")], None);
        let row = shape.row(br#"{"a":1,"b":"lost","c":{"x":1.10,"x":2},"d":0}"#);
        assert_eq!(row.text, r#"{"a":1,"B":"","c":{"x":1.10,"x":2}}"#);
    }

    #[test]
    fn what_does_not_fit_is_null() {
        let columns = [
            ("t", "datetime"),
            ("i", "int"),
            ("g", "guid"),
            ("b", "bool"),
            ("r", "real"),
            ("s", "string"),
        ];
        let row = shape(&columns, None)
            .row(br#"{"t":1700000000,"i":1.5,"g":"x","b":"true","r":"1.5","s":{"k":1}}"#);
        assert_eq!(
            row.text,
            r#"{"t":null,"i":null,"g":null,"b":true,"r":1.5,"s":"{\"k\":1}"}"#
        );
    }

    #[test]
    fn one_byte_over_a_mebibyte_is_null() {
        let shape = shape(&[("d", "dynamic")], None);
        let value = |size: usize| format!("{{\"d\":\"{}\"}}", "x".repeat(size - 2));
        assert_eq!(shape.row(value(VALUE_SIZE_MAX).as_bytes()).nulled_count, 0);
        let over = shape.row(value(VALUE_SIZE_MAX + 1).as_bytes());
        assert_eq!((over.text.as_str(), over.nulled_count), ("{\"d\":null}", 1));
    }

    #[test]
    fn a_mapping_goes_down_paths() {
        let mapping = r#"[{"column":"whole","Properties":{"Path":"$"}},
            {"Column":"deep","properties":{"path":"$.a['b c'][1]"}},
            {"column":"fixed","Properties":{"ConstValue":"x"}}]"#;
        let columns = [
            ("whole", "dynamic"),
            ("deep", "long"),
            ("fixed", "string"),
            ("none", "long"),
        ];
        let row = shape(&columns, Some(mapping)).row(br#"{"a":{"b c":[1,2]}}"#);
        assert_eq!(
            row.text,
            r#"{"whole":{"a":{"b c":[1,2]}},"deep":2,"fixed":"x","none":null}"#
        );
    }

    #[test]
    fn a_mapping_that_cannot_work_is_refused() {
        let columns = [Column::new("a", "long").unwrap()];
        for bad in [
            r#"[{"column":"b","Properties":{"Path":"$.b"}}]"#,
            r#"[{"column":"a","Properties":{"Path":"$.a"}},{"column":"a","Properties":{"Path":"$.b"}}]"#,
            r#"[{"column":"a","Properties":{"Path":"$..a"}}]"#,
            r#"[{"column":"a"}]"#,
            "{}",
        ] {
            assert!(Mapping::parse(bad, &columns).is_err(), "{bad}");
        }
    }
}
