//! The ingestion message: what a queue message has to say, checked key by key.
//!
//! Before it: a queue gave a text. After it: [`super::engine`] knows what to ingest, or why it cannot.
//! Thread: the runtime's. Allocates: per message.
//! Invariant: every departure from the contract is told; only what the service could not work with is refused.
//! Not here: whether blob, table, mapping and identity exist.
//!
//! Source: Kusto documentation, "How to ingest data using the REST API", and what the official clients send.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde_json::{Map, Value};

use super::catalog::Refused;

/// Bytes of JSON that fit a queue message of 64 KiB once they are base64.
const JSON_SIZE_MAX: usize = 48 << 10;

const KEYS: &[&str] = &[
    "Id",
    "BlobPath",
    "RawDataSize",
    "DatabaseName",
    "TableName",
    "RetainBlobOnSuccess",
    "FlushImmediately",
    "IgnoreSizeLimit",
    "ReportLevel",
    "ReportMethod",
    "SourceMessageCreationTime",
    "ApplicationForTracing",
    "ClientVersionForTracing",
    "ValidationPolicy",
    "IngestionStatusInTable",
    "AdditionalProperties",
];

const PROPERTIES: &[&str] = &[
    "authorizationContext",
    "format",
    "ingestionMappingReference",
    "ingestionMapping",
    "ingestionMappingType",
    "tags",
    "ingestIfNotExists",
    "ignoreFirstRecord",
    "creationTime",
    "zipPattern",
    "validationPolicy",
    "ValidationPolicy",
    "extend_schema",
    "recreate_schema",
    "TreatGzAsUncompressed",
];

const MAPPING_TYPES: &[&str] = &[
    "Csv",
    "Json",
    "Avro",
    "ApacheAvro",
    "Parquet",
    "Orc",
    "SStream",
    "W3CLogFile",
];

/// What the service reports about a blob: its `ReportLevel`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Report {
    Failures,
    Nothing,
    All,
}

#[derive(Debug, Clone)]
pub(super) struct Message {
    pub id: String,
    /// With its SAS.
    pub blob_path: String,
    pub raw_size: Option<u64>,
    pub database: String,
    pub table: String,
    pub retain_blob: bool,
    pub flush_immediately: bool,
    pub ignore_size_limit: bool,
    /// To the report queues; a status table is not played.
    pub report: Report,
    pub format: String,
    pub mapping_reference: Option<String>,
    pub mapping: Option<String>,
    pub tags: Vec<String>,
    pub ingest_if_not_exists: Vec<String>,
    pub authorization_context: String,
}

/// A message that was looked at.
pub(super) struct Checked {
    /// Its JSON, where it could be decoded.
    pub json: Option<String>,
    pub message: Result<Message, Refused>,
    pub violations: Vec<String>,
}

/// Decodes and checks the text of a queue message.
pub(super) fn check(text: &str) -> Checked {
    let mut violations = Vec::new();
    let corrupted = |details: &str| Err(("BadRequest_CorruptedMessage", details.to_owned()));
    let Ok(bytes) = STANDARD.decode(text) else {
        let details = "The message is not standard base64 with padding.";
        violations.push(details.into());
        return Checked {
            json: None,
            message: corrupted(details),
            violations,
        };
    };
    let Ok(json) = String::from_utf8(bytes) else {
        let details = "The message is not UTF-8.";
        violations.push(details.into());
        return Checked {
            json: None,
            message: corrupted(details),
            violations,
        };
    };
    if json.len() > JSON_SIZE_MAX {
        violations.push(format!(
            "the message has {} bytes of JSON, above {JSON_SIZE_MAX}",
            json.len()
        ));
    }
    let object = match serde_json::from_str::<Value>(&json) {
        Ok(Value::Object(object)) => object,
        _ => {
            // A byte order mark, a NUL at the end, or no JSON object at all.
            let details = "The message is not one JSON object, without a byte before or after it.";
            violations.push(details.into());
            return Checked {
                json: Some(json),
                message: corrupted(details),
                violations,
            };
        }
    };
    let mut reader = Reader { violations };
    let message = reader.message(&object);
    Checked {
        json: Some(json),
        message,
        violations: reader.violations,
    }
}

struct Reader {
    violations: Vec<String>,
}

impl Reader {
    fn violation(&mut self, text: impl Into<String>) {
        self.violations.push(text.into());
    }

    /// The value of a key that has to be there, as a string with something in it.
    fn required<'a>(
        &mut self,
        object: &'a Map<String, Value>,
        key: &str,
    ) -> Result<&'a str, Refused> {
        let text = object.get(key).and_then(Value::as_str).unwrap_or_default();
        if text.trim().is_empty() {
            let details = format!("{key} is missing, empty, or no string");
            self.violation(details.clone());
            return Err(("BadRequest_CorruptedMessage", details));
        }
        Ok(text)
    }

    fn optional<'a>(&mut self, object: &'a Map<String, Value>, key: &str) -> Option<&'a str> {
        match object.get(key)? {
            Value::String(text) if !text.is_empty() => return Some(text),
            Value::String(_) => self.violation(format!("{key} is empty; leave it out")),
            _ => self.violation(format!("{key} is no string")),
        }
        None
    }

    fn flag(&mut self, object: &Map<String, Value>, key: &str) -> bool {
        match object.get(key) {
            None => false,
            Some(Value::Bool(flag)) => *flag,
            Some(_) => {
                self.violation(format!("{key} is neither true nor false"));
                false
            }
        }
    }

    fn known(&mut self, object: &Map<String, Value>, keys: &[&str], place: &str) {
        for key in object.keys().filter(|key| !keys.contains(&key.as_str())) {
            let same = keys.iter().find(|known| known.eq_ignore_ascii_case(key));
            match same {
                Some(known) => {
                    self.violation(format!("{place} has {key}, which has to be {known}"))
                }
                None => self.violation(format!("{place} has an unknown or deprecated key {key}")),
            }
        }
    }

    fn message(&mut self, object: &Map<String, Value>) -> Result<Message, Refused> {
        self.known(object, KEYS, "the message");
        let id = self.required(object, "Id")?.to_owned();
        if id.len() != 36 || id.parse::<uuid::Uuid>().is_err() {
            self.violation(format!("Id is no GUID: {id}"));
        }
        let blob_path = self.required(object, "BlobPath")?.to_owned();
        let plain = |byte: u8| byte.is_ascii_graphic() && !b"\"<>\\^`{|}".contains(&byte);
        if !blob_path.bytes().all(plain) {
            self.violation("BlobPath has a byte that has to be percent-encoded");
        }
        let report = self.report(object);
        for key in ["ApplicationForTracing", "ClientVersionForTracing"] {
            self.optional(object, key);
        }
        if let Some(time) = self.optional(object, "SourceMessageCreationTime") {
            let zoned = time.parse::<jiff::Timestamp>().is_ok();
            // The Python client sends no zone.
            if !zoned && time.parse::<jiff::civil::DateTime>().is_err() {
                self.violation(format!("SourceMessageCreationTime is not ISO 8601: {time}"));
            }
        }
        let properties = match object.get("AdditionalProperties") {
            Some(Value::Object(properties)) => properties,
            _ => {
                let details = "AdditionalProperties is missing or no object";
                self.violation(details);
                return Err(("BadRequest_CorruptedMessage", details.into()));
            }
        };
        self.known(properties, PROPERTIES, "AdditionalProperties");
        let mut message = Message {
            id,
            blob_path,
            raw_size: self.raw_size(object),
            database: self.required(object, "DatabaseName")?.into(),
            table: self.required(object, "TableName")?.into(),
            retain_blob: self.flag(object, "RetainBlobOnSuccess"),
            flush_immediately: self.flag(object, "FlushImmediately"),
            ignore_size_limit: self.flag(object, "IgnoreSizeLimit"),
            report,
            format: self.format(properties),
            mapping_reference: self
                .optional(properties, "ingestionMappingReference")
                .map(Into::into),
            mapping: self
                .optional(properties, "ingestionMapping")
                .map(Into::into),
            tags: self.list(properties, "tags")?,
            ingest_if_not_exists: self.list(properties, "ingestIfNotExists")?,
            authorization_context: self.required(properties, "authorizationContext")?.into(),
        };
        message.format.make_ascii_lowercase();
        self.mapping_type(properties, &message);
        for value in &message.ingest_if_not_exists {
            if value.starts_with("ingest-by:") {
                self.violation("ingestIfNotExists takes values without ingest-by:");
            }
            if !message.tags.contains(&format!("ingest-by:{value}")) {
                self.violation("ingestIfNotExists has a value that tags does not stamp, so a repeat is not seen");
            }
        }
        Ok(message)
    }

    /// Documents show a string, clients send a number; both are taken.
    fn raw_size(&mut self, object: &Map<String, Value>) -> Option<u64> {
        let value = object.get("RawDataSize")?;
        let size = match value {
            Value::String(text) => text.parse().ok(),
            other => other.as_u64(),
        };
        if size.is_none_or(|size| size == 0) {
            self.violation(format!(
                "RawDataSize is not a positive whole number: {value}"
            ));
        }
        size
    }

    fn report(&mut self, object: &Map<String, Value>) -> Report {
        let method = object
            .get("ReportMethod")
            .cloned()
            .unwrap_or_else(|| 0.into());
        if method != 0 && method != "Queue" {
            self.violation(format!(
                "ReportMethod {method}: the stand-in plays no status table"
            ));
        }
        let level = object
            .get("ReportLevel")
            .cloned()
            .unwrap_or_else(|| 0.into());
        // The Java client sends names.
        match level {
            level if level == 0 || level == "FailuresOnly" => Report::Failures,
            level if level == 1 || level == "None" => Report::Nothing,
            level if level == 2 || level == "FailuresAndSuccesses" => Report::All,
            level => {
                self.violation(format!("ReportLevel is unknown: {level}"));
                Report::Failures
            }
        }
    }

    fn format(&mut self, properties: &Map<String, Value>) -> String {
        match self.optional(properties, "format") {
            None => {
                self.violation("format is missing, and would be csv");
                "csv".into()
            }
            Some(format) => {
                if format.chars().any(char::is_uppercase) {
                    self.violation(format!("format is written in lower case: {format}"));
                }
                format.into()
            }
        }
    }

    fn mapping_type(&mut self, properties: &Map<String, Value>, message: &Message) {
        let mapped = message.mapping_reference.is_some() || message.mapping.is_some();
        let kind = self.optional(properties, "ingestionMappingType");
        match (kind, mapped) {
            (None, false) => {}
            (None, true) => {
                self.violation("a mapping is named, but ingestionMappingType is missing")
            }
            (Some(kind), _) if !MAPPING_TYPES.contains(&kind) => {
                self.violation(format!(
                    "ingestionMappingType is matched exactly, and {kind} is none"
                ));
            }
            (Some(kind), _) => {
                let json = ["json", "multijson", "singlejson"].contains(&message.format.as_str());
                if json != (kind == "Json") {
                    self.violation(format!(
                        "ingestionMappingType {kind} does not go with format {}",
                        message.format
                    ));
                }
            }
        }
    }

    /// A JSON list of strings, as a string.
    fn list(&mut self, properties: &Map<String, Value>, key: &str) -> Result<Vec<String>, Refused> {
        let Some(value) = properties.get(key) else {
            return Ok(Vec::new());
        };
        let list = value
            .as_str()
            .and_then(|text| serde_json::from_str(text).ok());
        list.ok_or_else(|| {
            let details = format!("{key} is not a JSON list of strings within a string");
            self.violation(details.clone());
            ("BadRequest_MalformedIngestionProperty", details)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn good() -> Value {
        json!({
            "Id": "7f6f5a3c-0f0b-4b87-9a53-2f5f1f2f8a10",
            "BlobPath": "http://127.0.0.1:1/account0/c/b.json.gz?sig=x%2F",
            "RawDataSize": 10,
            "DatabaseName": "a \"quoted\" \\ name",
            "TableName": "Logs",
            "RetainBlobOnSuccess": true,
            "FlushImmediately": false,
            "ReportLevel": 1,
            "ReportMethod": 0,
            "SourceMessageCreationTime": "2026-08-20T10:11:12.345678Z",
            "AdditionalProperties": {
                "authorizationContext": "token",
                "format": "json",
                "ingestionMappingReference": "m",
                "ingestionMappingType": "Json",
                "tags": "[\"ingest-by:x\"]",
                "ingestIfNotExists": "[\"x\"]",
            },
        })
    }

    fn check_json(json: &str) -> Checked {
        check(&STANDARD.encode(json))
    }

    #[test]
    fn the_canonical_message_passes() {
        let checked = check_json(&good().to_string());
        assert_eq!(checked.violations, Vec::<String>::new());
        let message = checked.message.unwrap();
        assert_eq!(message.database, "a \"quoted\" \\ name");
        assert_eq!(message.ingest_if_not_exists, ["x"]);
    }

    #[test]
    fn each_departure_is_told() {
        // (JSON pointer to the parent, key, value or null for none, whether the message is refused)
        let cases = [
            ("", "Id", json!(null), true),
            ("", "Id", json!("not-a-guid"), false),
            ("", "BlobPath", json!("http://h/a b"), false),
            ("", "RawDataSize", json!(-1), false),
            ("", "DatabaseName", json!(7), true),
            ("", "RetainBlobOnSuccess", json!("true"), false),
            ("", "ReportLevel", json!(9), false),
            ("", "ReportMethod", json!(1), false),
            ("", "id", json!("x"), false),
            ("", "StatusInQueue", json!("x"), false),
            ("", "SourceMessageCreationTime", json!("yesterday"), false),
            ("", "AdditionalProperties", json!("x"), true),
            (
                "/AdditionalProperties",
                "authorizationContext",
                json!(" "),
                true,
            ),
            ("/AdditionalProperties", "format", json!(null), false),
            ("/AdditionalProperties", "format", json!("Json"), false),
            (
                "/AdditionalProperties",
                "ingestionMappingReference",
                json!(""),
                false,
            ),
            (
                "/AdditionalProperties",
                "ingestionMappingType",
                json!("json"),
                false,
            ),
            (
                "/AdditionalProperties",
                "ingestionMappingType",
                json!("Csv"),
                false,
            ),
            (
                "/AdditionalProperties",
                "ingestionMappingType",
                json!(null),
                false,
            ),
            (
                "/AdditionalProperties",
                "jsonMappingReference",
                json!("m"),
                false,
            ),
            (
                "/AdditionalProperties",
                "tags",
                json!(["ingest-by:x"]),
                true,
            ),
            (
                "/AdditionalProperties",
                "ingestIfNotExists",
                json!("[\"ingest-by:x\"]"),
                false,
            ),
        ];
        for (parent, key, value, refused) in cases {
            let mut message = good();
            let object = message
                .pointer_mut(parent)
                .unwrap()
                .as_object_mut()
                .unwrap();
            match value.is_null() {
                true => object.remove(key),
                false => object.insert(key.into(), value.clone()),
            };
            let checked = check_json(&message.to_string());
            assert!(!checked.violations.is_empty(), "{key}: {value}");
            assert_eq!(checked.message.is_err(), refused, "{key}: {value}");
        }
    }

    #[test]
    fn no_byte_may_surround_the_json() {
        let json = good().to_string();
        for bad in [format!("{json}\0"), format!("\u{feff}{json}"), "[]".into()] {
            assert_eq!(
                check_json(&bad).message.unwrap_err().0,
                "BadRequest_CorruptedMessage"
            );
        }
        let unpadded = STANDARD
            .encode(json + "  ")
            .trim_end_matches('=')
            .to_owned()
            + "A";
        assert!(check(&unpadded).message.is_err());
    }
}
