//! Configuration errors: a message, the key it is about, and its place in the file.
//!
//! `raw.rs` and `validate.rs` know a byte range of the text; here it becomes line, column and key.

use std::fmt;
use std::ops::Range;
use std::path::{Path, PathBuf};

use toml::de::{DeTable, DeValue};

/// A message about a part of the text.
pub(super) struct Placed {
    pub span: Range<usize>,
    pub message: String,
}

/// All that is wrong with one file; prints one line per error.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ConfigErrors {
    pub path: PathBuf,
    /// At least one, in the order of the file.
    pub errors: Vec<ConfigError>,
}

/// One thing that is wrong.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ConfigError {
    /// From 1.
    pub line: usize,
    /// From 1, in characters.
    pub column: usize,
    /// The offending key with its tables (`slabs.classes[1].size`), or nothing where the text is
    /// not TOML.
    pub key: String,
    /// What is wrong and what to change.
    pub message: String,
}

impl ConfigErrors {
    pub(super) fn new(path: &Path, text: &str, mut placed: Vec<Placed>) -> Self {
        assert!(!placed.is_empty(), "an error without a message");
        placed.sort_by_key(|placed| placed.span.start);
        let (document, _) = DeTable::parse_recoverable(text);
        let errors = placed
            .into_iter()
            .map(|Placed { span, message }| {
                // A span never splits a character; if one did, the end of the text is the place.
                let before = text.get(..span.start).unwrap_or(text);
                let line_start = before.rfind('\n').map_or(0, |index| index + 1);
                let mut key = String::new();
                key_at_table(document.get_ref(), span.start, &mut key);
                ConfigError {
                    line: before.matches('\n').count() + 1,
                    column: before[line_start..].chars().count() + 1,
                    key,
                    message,
                }
            })
            .collect();
        Self {
            path: path.into(),
            errors,
        }
    }
}

/// Appends the path of the innermost key that `offset` lies in.
fn key_at_table(table: &DeTable<'_>, offset: usize, path: &mut String) {
    for (key, value) in table {
        if key.span().contains(&offset) || value_contains(value, offset) {
            if !path.is_empty() {
                path.push('.');
            }
            path.push_str(key.get_ref());
            key_at_value(value.get_ref(), offset, path);
            return;
        }
    }
}

fn key_at_value(value: &DeValue<'_>, offset: usize, path: &mut String) {
    match value {
        DeValue::Table(table) => key_at_table(table, offset, path),
        DeValue::Array(values) => {
            for (index, value) in values.iter().enumerate() {
                if value_contains(value, offset) {
                    path.push_str(&format!("[{index}]"));
                    key_at_value(value.get_ref(), offset, path);
                    return;
                }
            }
        }
        _ => {}
    }
}

/// Whether `offset` is in the value's own text or in anything it holds: a table's span is its
/// header alone, its keys follow outside.
fn value_contains(value: &toml::Spanned<DeValue<'_>>, offset: usize) -> bool {
    value.span().contains(&offset)
        || match value.get_ref() {
            DeValue::Table(table) => table
                .iter()
                .any(|(key, value)| key.span().contains(&offset) || value_contains(value, offset)),
            DeValue::Array(values) => values.iter().any(|value| value_contains(value, offset)),
            _ => false,
        }
}

impl fmt::Display for ConfigErrors {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, error) in self.errors.iter().enumerate() {
            if index > 0 {
                writeln!(f)?;
            }
            let path = self.path.display();
            write!(f, "{path}:{}:{}: ", error.line, error.column)?;
            if !error.key.is_empty() {
                write!(f, "{}: ", printable(&error.key))?;
            }
            // One error is one line, whatever a parser puts into its message.
            let message: Vec<&str> = error.message.lines().collect();
            write!(f, "{}", printable(&message.join(", ")))?;
        }
        Ok(())
    }
}

impl std::error::Error for ConfigErrors {}

/// Text of the file as it can be shown: what it may hold of control characters would end the line, or worse.
fn printable(text: &str) -> String {
    let mut printable = String::with_capacity(text.len());
    for c in text.chars() {
        if c.is_control() {
            printable.extend(c.escape_default());
        } else {
            printable.push(c);
        }
    }
    printable
}

/// The name among `names` that `text` was likely meant to be.
pub(super) fn nearest<'a>(text: &str, names: &[&'a str]) -> Option<&'a str> {
    let lower = text.to_lowercase();
    names
        .iter()
        .map(|name| (strsim::damerau_levenshtein(&lower, name), *name))
        // A third of the name may be wrong; more is another word.
        .filter(|(distance, name)| *distance <= name.len().div_ceil(3))
        .min_by_key(|(distance, _)| *distance)
        .map(|(_, name)| name)
}

/// `a`, `b` or `c`, in backticks.
pub(super) fn list(names: &[&str]) -> String {
    let quoted: Vec<String> = names.iter().map(|name| format!("`{name}`")).collect();
    match quoted.split_last() {
        Some((last, [])) => last.clone(),
        Some((last, rest)) => format!("{} or {last}", rest.join(", ")),
        None => String::new(),
    }
}
