//! The shape of the configuration file: its keys and their types, nothing about their values.
//!
//! Every key is optional here, and keeps its place in the text for the messages of `validate.rs`,
//! which takes the defaults from `Config::default`.
//! Unknown keys are errors: a key that is silently ignored is a setting that someone believes in.

use std::fmt;
use std::marker::PhantomData;

use serde::de::value::MapAccessDeserializer;
use serde::de::{MapAccess, Visitor};
use serde::{Deserialize, Deserializer};
use toml::Spanned;
use toml::de::{DeTable, DeValue};

use super::error::{Placed, list, nearest};

/// Errors of shape that one run reports; reading again for each is quadratic.
const ERROR_COUNT_MAX: usize = 50;

/// A key that may be absent.
pub(super) type Key<T> = Option<Spanned<T>>;

#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields, default)]
pub(super) struct RawConfig {
    pub cores: Key<RawCores>,
    pub listener: Key<Vec<TableOf<RawListener>>>,
    pub admin: TableOf<RawAdmin>,
    pub destination: TableOf<RawDestination>,
    pub spool: TableOf<RawSpool>,
    pub uplink: TableOf<RawUplink>,
    pub dead_letter: TableOf<RawDeadLetter>,
    pub batch: TableOf<RawBatch>,
    pub compression: TableOf<RawCompression>,
    pub response: TableOf<RawResponse>,
    pub slabs: TableOf<RawSlabs>,
    pub upload: TableOf<RawUpload>,
    pub limits: TableOf<RawLimits>,
    pub deadlines: TableOf<RawDeadlines>,
    pub http2: TableOf<RawHttp2>,
    pub memory: TableOf<RawMemory>,
    pub principal: Key<Vec<Spanned<TableOf<RawPrincipal>>>>,
    pub route: Key<Vec<Spanned<TableOf<RawRoute>>>>,
}

#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields, default)]
pub(super) struct RawListener {
    pub address: Key<String>,
    pub principals: Key<Vec<Spanned<String>>>,
    pub allow: Key<Vec<Spanned<String>>>,
    pub proxies: Key<Vec<Spanned<String>>>,
    pub http2: Key<bool>,
    pub tls: Key<TableOf<RawListenerTls>>,
}

#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields, default)]
pub(super) struct RawListenerTls {
    pub certificate: Key<String>,
    pub key: Key<String>,
    pub client_ca: Key<String>,
    pub client_crl: Key<String>,
    pub client_auth: Key<String>,
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
    pub ingest_uri: Key<String>,
    pub identity: Key<TableOf<RawIdentity>>,
    pub mode: Key<String>,
    pub trusted_hosts: Key<Vec<Spanned<String>>>,
}

/// One of these keys.
#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields, default)]
pub(super) struct RawIdentity {
    pub managed_identity: Key<RawManagedIdentity>,
    pub workload_identity: Key<TableOf<RawWorkloadIdentity>>,
    pub client_secret: Key<TableOf<RawClientSecret>>,
    pub client_certificate: Key<TableOf<RawClientCertificate>>,
    pub azure_cli: Key<TableOf<RawAzureCli>>,
}

#[derive(Deserialize)]
#[serde(
    untagged,
    expecting = "expected \"system\", or the user-assigned one as { client_id = \"…\" }"
)]
pub(super) enum RawManagedIdentity {
    Word(String),
    User(TableOf<RawUserAssigned>),
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct RawUserAssigned {
    pub client_id: String,
}

#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields, default)]
pub(super) struct RawWorkloadIdentity {
    pub tenant: Key<String>,
    pub client_id: Key<String>,
    pub token_file: Key<String>,
}

#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields, default)]
pub(super) struct RawClientSecret {
    pub tenant: Key<String>,
    pub client_id: Key<String>,
    pub secret: Key<RawSecret>,
}

#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields, default)]
pub(super) struct RawClientCertificate {
    pub tenant: Key<String>,
    pub client_id: Key<String>,
    pub certificate: Key<RawSecret>,
}

#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields, default)]
pub(super) struct RawAzureCli {}

/// Where a secret is. Untagged, so that no message repeats what stood in its place.
#[derive(Deserialize)]
#[serde(
    untagged,
    expecting = "expected where the secret is, as { env = \"NAME\" } or { file = \"path\" }; \
                 a secret does not stand in the configuration"
)]
pub(super) enum RawSecret {
    Env(TableOf<RawSecretEnv>),
    File(TableOf<RawSecretFile>),
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct RawSecretEnv {
    pub env: String,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct RawSecretFile {
    pub file: String,
}

#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields, default)]
pub(super) struct RawSpool {
    pub directory: Key<String>,
    pub size: Key<RawSize>,
}

#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields, default)]
pub(super) struct RawUplink {
    pub concurrency: Key<i64>,
}

#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields, default)]
pub(super) struct RawDeadLetter {
    pub directory: Key<String>,
    pub size: Key<RawSize>,
    pub age: Key<RawDuration>,
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
    pub classes: Key<Vec<Spanned<TableOf<RawSlabClass>>>>,
}

#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields, default)]
pub(super) struct RawSlabClass {
    pub size: Key<RawSize>,
    pub count: Key<i64>,
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
    pub connections_per_address: Key<i64>,
    pub requests_per_connection: Key<i64>,
    pub record: Key<RawSize>,
    pub ack: Key<RawDuration>,
    pub drain: Key<RawDuration>,
}

#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields, default)]
pub(super) struct RawDeadlines {
    pub handshake: Key<RawDuration>,
    pub head: Key<RawDuration>,
    pub body_start: Key<RawDuration>,
    pub body: Key<RawDuration>,
    pub body_rate: Key<RawSize>,
    pub body_rate_window: Key<RawDuration>,
    pub contended: Key<RawDuration>,
    pub write: Key<RawDuration>,
    pub idle: Key<RawDuration>,
}

#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields, default)]
pub(super) struct RawHttp2 {
    pub connections: Key<i64>,
    pub streams: Key<i64>,
    pub window: Key<RawSize>,
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
    pub ack: Key<String>,
    pub default_tag: Key<String>,
    pub mapping: Key<String>,
    pub dedup: Key<String>,
    pub principals: Key<Vec<Spanned<String>>>,
    pub allow: Key<Vec<Spanned<String>>>,
    pub rate: Key<TableOf<RawRate>>,
}

#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields, default)]
pub(super) struct RawPrincipal {
    pub name: Key<String>,
    pub bearer: Key<Vec<Spanned<RawCredential>>>,
    pub basic: Key<TableOf<RawBasic>>,
    pub hmac: Key<TableOf<RawHmac>>,
    pub certificate: Key<TableOf<RawCertificate>>,
    pub rate: Key<TableOf<RawRate>>,
}

#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields, default)]
pub(super) struct RawBasic {
    pub user: Key<String>,
    pub passwords: Key<Vec<Spanned<RawCredential>>>,
}

#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields, default)]
pub(super) struct RawHmac {
    pub secrets: Key<Vec<Spanned<RawCredential>>>,
    pub header: Key<String>,
    pub prefix: Key<String>,
    pub encoding: Key<String>,
}

#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields, default)]
pub(super) struct RawCertificate {
    pub subjects: Key<Vec<Spanned<String>>>,
}

#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields, default)]
pub(super) struct RawRate {
    pub requests: Key<i64>,
    pub bytes: Key<RawSize>,
    pub burst: Key<RawDuration>,
}

/// Where a secret is. A secret itself in its place is refused with a message of its own: that of serde would show it.
pub(super) struct RawCredential(pub CredentialTable);

#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields, default)]
pub(super) struct CredentialTable {
    pub env: Key<String>,
    pub file: Key<String>,
    pub sha256: Key<String>,
}

impl<'de> Deserialize<'de> for RawCredential {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct CredentialVisitor;

        impl<'de> Visitor<'de> for CredentialVisitor {
            type Value = RawCredential;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a table with `env` or `file`")
            }

            fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<Self::Value, A::Error> {
                CredentialTable::deserialize(MapAccessDeserializer::new(map)).map(RawCredential)
            }

            fn visit_str<E: serde::de::Error>(self, _: &str) -> Result<Self::Value, E> {
                Err(E::custom(
                    "a secret does not belong into this file; say where it is, \
                     { env = \"NAME\" } or { file = \"path\" }, and consider this one known",
                ))
            }
        }

        deserializer.deserialize_any(CredentialVisitor)
    }
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

/// A TOML table. A derived `Deserialize` would take an array too, its elements for the fields in
/// order.
#[derive(Default)]
pub(super) struct TableOf<T>(pub T);

impl<'de, T: Deserialize<'de>> Deserialize<'de> for TableOf<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct TableVisitor<T>(PhantomData<T>);

        impl<'de, T: Deserialize<'de>> Visitor<'de> for TableVisitor<T> {
            type Value = TableOf<T>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a table")
            }

            fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<Self::Value, A::Error> {
                T::deserialize(MapAccessDeserializer::new(map)).map(TableOf)
            }
        }

        deserializer.deserialize_map(TableVisitor(PhantomData))
    }
}

/// Reads the text as TOML of this shape.
///
/// serde stops at the first error; so that one run shows them all, the entry with the error is
/// removed and the rest read again. Values are not looked at before the shape is right: a default
/// in place of a misspelt key would lead to errors that are not there.
pub(super) fn parse(text: &str) -> Result<RawConfig, Vec<Placed>> {
    let place = |error: toml::de::Error| Placed {
        span: error.span().unwrap_or(0..0),
        message: message(error.message()),
    };
    let mut document = DeTable::parse(text).map_err(|error| vec![place(error)])?;
    let mut errors = Vec::new();
    while errors.len() < ERROR_COUNT_MAX {
        match RawConfig::deserialize(toml::Deserializer::from(document.clone())) {
            Ok(raw) if errors.is_empty() => return Ok(raw),
            Ok(_) => break,
            Err(error) => {
                let error = place(error);
                let offset = error.span.start;
                errors.push(error);
                if !remove_from_table(document.get_mut(), offset) {
                    break;
                }
            }
        }
    }
    Err(errors)
}

/// Removes the innermost entry whose key or value starts at `offset`; elements of arrays stay, with
/// an error in one the search for more ends.
fn remove_from_table(table: &mut DeTable<'_>, offset: usize) -> bool {
    if table
        .iter_mut()
        .any(|(_, value)| remove_from_value(value.get_mut(), offset))
    {
        return true;
    }
    let key = table
        .iter()
        .find(|(key, value)| key.span().start == offset || value.span().start == offset)
        .map(|(key, _)| key.clone());
    key.is_some_and(|key| table.remove(&key).is_some())
}

fn remove_from_value(value: &mut DeValue<'_>, offset: usize) -> bool {
    match value {
        DeValue::Table(table) => remove_from_table(table, offset),
        DeValue::Array(values) => values
            .iter_mut()
            .any(|value| remove_from_value(value.get_mut(), offset)),
        _ => false,
    }
}

/// Turns serde's message into one that says what to change.
fn message(serde_message: &str) -> String {
    let quoted: Vec<&str> = serde_message.split('`').skip(1).step_by(2).collect();
    if serde_message.starts_with("unknown field") {
        // unknown field `x`, expected one of `a`, `b`
        let (unknown, known) = quoted.split_first().expect("serde names the field");
        return match nearest(unknown, known) {
            _ if known.is_empty() => format!("unknown key `{unknown}`; remove it"),
            Some(name) => format!("unknown key `{unknown}`; did you mean `{name}`?"),
            None => format!("unknown key `{unknown}`; remove it or use {}", list(known)),
        };
    }
    // serde repeats the string it found, which may be a secret in a place where none belongs.
    let (found, expected) = serde_message
        .rsplit_once(", expected ")
        .unwrap_or((serde_message, ""));
    let serde_message = match found.starts_with("invalid type: string ") {
        true => &format!("invalid type: string, expected {expected}"),
        false => serde_message,
    };
    // serde's words for TOML's types.
    serde_message
        .replace("expected i64", "expected a whole number")
        .replace("a sequence", "an array")
        .replace("type: sequence", "type: array")
        .replace("type: map", "type: table")
}
