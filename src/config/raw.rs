//! The shape of the configuration file: its keys and their types, nothing about their values.
//!
//! Every key is optional here, and keeps its place in the text for the messages of `validate.rs`,
//! which takes the defaults from `Config::default`.
//! Unknown keys are errors: a key that is silently ignored is a setting that someone believes in.

use serde::Deserialize;
use toml::Spanned;

use super::error::{Placed, list, nearest};

/// A key that may be absent.
pub(super) type Key<T> = Option<Spanned<T>>;

#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields, default)]
pub(super) struct RawConfig {
    pub cores: Key<RawCores>,
    pub listener: Key<Vec<RawListener>>,
    pub admin: RawAdmin,
    pub destination: RawDestination,
    pub batch: RawBatch,
    pub compression: RawCompression,
    pub response: RawResponse,
    pub slabs: RawSlabs,
    pub upload: RawUpload,
    pub limits: RawLimits,
    pub memory: RawMemory,
    pub route: Key<Vec<Spanned<RawRoute>>>,
}

#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields, default)]
pub(super) struct RawListener {
    pub address: Key<String>,
}

#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields, default)]
pub(super) struct RawAdmin {
    pub address: Key<String>,
}

#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields, default)]
pub(super) struct RawDestination {
    #[serde(rename = "type")]
    pub kind: Key<String>,
    pub path: Key<String>,
}

#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields, default)]
pub(super) struct RawBatch {
    pub max_age: Key<RawDuration>,
}

#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields, default)]
pub(super) struct RawCompression {
    pub level: Key<i64>,
}

#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields, default)]
pub(super) struct RawResponse {
    pub status: Key<i64>,
}

#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields, default)]
pub(super) struct RawSlabs {
    pub registered: Key<String>,
    pub classes: Key<Vec<RawSlabClass>>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct RawSlabClass {
    pub size: Spanned<RawSize>,
    pub count: Spanned<i64>,
}

#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields, default)]
pub(super) struct RawUpload {
    pub buffer_count: Key<i64>,
    pub buffer_size: Key<RawSize>,
}

#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields, default)]
pub(super) struct RawLimits {
    pub wait: Key<RawDuration>,
    pub connections: Key<i64>,
    pub record: Key<RawSize>,
    pub drain: Key<RawDuration>,
}

#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields, default)]
pub(super) struct RawMemory {
    pub limit: Key<RawSize>,
}

#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields, default)]
pub(super) struct RawRoute {
    pub path: Key<String>,
    pub database: Key<String>,
    pub table: Key<String>,
    pub envelope: Key<String>,
    pub default_tag: Key<String>,
}

#[derive(Deserialize)]
#[serde(untagged, expecting = "expected a number of cores, or \"all\"")]
pub(super) enum RawCores {
    Count(i64),
    Word(String),
}

#[derive(Deserialize)]
#[serde(
    untagged,
    expecting = "expected a size such as \"8MiB\", or a number of bytes"
)]
pub(super) enum RawSize {
    Bytes(i64),
    Text(String),
}

#[derive(Deserialize)]
#[serde(
    untagged,
    expecting = "expected a duration in quotes, such as \"10s\" or \"500ms\""
)]
pub(super) enum RawDuration {
    Text(String),
}

/// Reads the text as TOML of this shape.
pub(super) fn parse(text: &str) -> Result<RawConfig, Placed> {
    toml::from_str(text).map_err(|error: toml::de::Error| Placed {
        span: error.span().unwrap_or(0..0),
        message: message(error.message()),
    })
}

/// Turns serde's message into one that says what to change.
fn message(serde_message: &str) -> String {
    let quoted: Vec<&str> = serde_message.split('`').skip(1).step_by(2).collect();
    if serde_message.starts_with("unknown field") {
        // unknown field `x`, expected one of `a`, `b`
        let (unknown, known) = quoted.split_first().expect("serde names the field");
        return match nearest(unknown, known) {
            Some(name) => format!("unknown key `{unknown}`; did you mean `{name}`?"),
            None => format!("unknown key `{unknown}`; remove it or use {}", list(known)),
        };
    }
    if serde_message.starts_with("missing field") {
        return format!("the key `{}` is missing; add it", quoted[0]);
    }
    serde_message.to_owned()
}
