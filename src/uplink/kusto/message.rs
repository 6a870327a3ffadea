//! The queue message: what the service is told about one blob.
//!
//! Before it: `delivery.rs` has put a blob.
//! After it: `storage.rs` posts the message.
//! Thread: the uplink's runtime. Allocates: per message, bounded by `MESSAGE_SIZE_MAX`.
//! Invariant: the JSON is made by a serializer, so no name can end it early; the same blob has the same `Id`.
//! Not here: base64 and XML, which are the queue's (`storage.rs`).
//!
//! Source: "How to ingest data without the Kusto.Ingest library" for the fields, and the official clients for their
//! forms: `tags` and `ingestIfNotExists` are JSON inside a string, `ingestionMappingType` is matched exactly.

use jiff::Timestamp;
use serde::Serialize;
use uuid::Uuid;
use zeroize::Zeroizing;

use super::CLIENT_VERSION;
use crate::config::{Dedup, Table};
use crate::limits::MESSAGE_SIZE_MAX;
use crate::secret::{SasUrl, Secret};

/// Names below this one are weir's blobs. (A v5 name itself, of "weir" below the URL namespace.)
const BLOB_NAMESPACE: Uuid = Uuid::from_u128(0x0ff0_12f1_2c5c_5d0d_9a3c_1f1b_6f1d_7c11);

/// The message's `Id`: RFC 9562 §5.5, a UUIDv5 of the blob's name, so the same after a crash.
pub fn id(blob_name: &str) -> Uuid {
    Uuid::new_v5(&BLOB_NAMESPACE, blob_name.as_bytes())
}

/// What a message says besides the name of the table.
pub struct MessageParts<'a> {
    /// As the caller named the blob.
    pub blob_name: &'a str,
    /// Where it is, with a signature that lets the service read it.
    pub blob_url: &'a SasUrl,
    /// Uncompressed.
    pub raw_size: u64,
    pub created_at: Timestamp,
    pub identity_token: &'a Secret,
}

/// The message is above what a queue takes.
#[derive(Debug, PartialEq, Eq)]
pub struct MessageTooLarge {
    pub size: usize,
}

/// The JSON of the message. It holds a signature and a token, so it is secret as a whole.
pub fn json(table: &Table, parts: &MessageParts<'_>) -> Result<Zeroizing<String>, MessageTooLarge> {
    let once = match table.dedup {
        Dedup::Off => None,
        Dedup::IngestBy => Some(ingest_by(parts.blob_name)),
    };
    let list = |value: String| serde_json::json!([value]).to_string();
    let blob_path = parts.blob_url.expose();
    let message = Message {
        id: id(parts.blob_name),
        blob_path: &blob_path,
        raw_data_size: parts.raw_size,
        database_name: &table.database,
        table_name: &table.table,
        // The service cleans its own containers; until then the blob can be ingested again.
        retain_blob_on_success: true,
        flush_immediately: false,
        ignore_size_limit: false,
        report_level: 0,
        report_method: 0,
        source_message_creation_time: format!("{:.6}", parts.created_at),
        application_for_tracing: "weir",
        client_version_for_tracing: CLIENT_VERSION,
        additional_properties: AdditionalProperties {
            authorization_context: parts.identity_token.expose(),
            format: "json",
            ingestion_mapping_reference: table.mapping.as_deref(),
            ingestion_mapping_type: table.mapping.as_ref().map(|_| "Json"),
            tags: once
                .as_ref()
                .map(|value| list(format!("ingest-by:{value}"))),
            ingest_if_not_exists: once.map(list),
        },
    };
    let json = serde_json::to_string(&message).expect("text and numbers always serialize");
    let json = Zeroizing::new(json);
    match json.len() <= MESSAGE_SIZE_MAX {
        true => Ok(json),
        false => Err(MessageTooLarge { size: json.len() }),
    }
}

/// What an extent of this blob is tagged with: the same for the same rows, also after a restart.
fn ingest_by(blob_name: &str) -> String {
    let name = blob_name.strip_suffix(".json.gz").unwrap_or(blob_name);
    name.to_owned()
}

#[derive(Serialize)]
#[serde(rename_all = "PascalCase")]
struct Message<'a> {
    id: Uuid,
    blob_path: &'a str,
    raw_data_size: u64,
    database_name: &'a str,
    table_name: &'a str,
    retain_blob_on_success: bool,
    flush_immediately: bool,
    ignore_size_limit: bool,
    report_level: u8,
    report_method: u8,
    source_message_creation_time: String,
    application_for_tracing: &'a str,
    client_version_for_tracing: &'a str,
    additional_properties: AdditionalProperties<'a>,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct AdditionalProperties<'a> {
    authorization_context: &'a str,
    format: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    ingestion_mapping_reference: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    ingestion_mapping_type: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    tags: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    ingest_if_not_exists: Option<String>,
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::Value;

    fn message(table: &Table, blob_name: &str, token: &str) -> Result<Value, MessageTooLarge> {
        let parts = MessageParts {
            blob_name,
            blob_url: &SasUrl::new("https://a.blob.core.windows.net/c/b.json.gz?sig=x%2By"),
            raw_size: 5_000_000_000,
            created_at: "2026-08-20T10:11:12.345678901Z".parse().unwrap(),
            identity_token: &Secret::new(token),
        };
        json(table, &parts).map(|json| serde_json::from_str(&json).unwrap())
    }

    fn table(database: &str, table: &str, mapping: Option<&str>, dedup: Dedup) -> Table {
        Table {
            database: database.into(),
            table: table.into(),
            mapping: mapping.map(Into::into),
            dedup,
            spooled: true,
            delivered: false,
        }
    }

    #[test]
    fn a_message_has_exactly_the_canonical_fields() {
        let plain = message(
            &table("db1", "Logs", None, Dedup::Off),
            "n-c0-1.json.gz",
            "tok==",
        )
        .unwrap();
        let expected = serde_json::json!({
            "Id": id("n-c0-1.json.gz").to_string(),
            "BlobPath": "https://a.blob.core.windows.net/c/b.json.gz?sig=x%2By",
            "RawDataSize": 5_000_000_000_u64,
            "DatabaseName": "db1",
            "TableName": "Logs",
            "RetainBlobOnSuccess": true,
            "FlushImmediately": false,
            "IgnoreSizeLimit": false,
            "ReportLevel": 0,
            "ReportMethod": 0,
            "SourceMessageCreationTime": "2026-08-20T10:11:12.345678Z",
            "ApplicationForTracing": "weir",
            "ClientVersionForTracing": CLIENT_VERSION,
            "AdditionalProperties": {"authorizationContext": "tok==", "format": "json"},
        });
        assert_eq!(plain, expected);
        let full = table("db1", "Logs", Some("m1"), Dedup::IngestBy);
        let full = message(&full, "n-c0-1.json.gz", "tok==").unwrap();
        let expected = serde_json::json!({
            "authorizationContext": "tok==",
            "format": "json",
            "ingestionMappingReference": "m1",
            "ingestionMappingType": "Json",
            "tags": "[\"ingest-by:n-c0-1\"]",
            "ingestIfNotExists": "[\"n-c0-1\"]",
        });
        assert_eq!(full["AdditionalProperties"], expected);
    }

    #[test]
    fn an_id_is_of_the_name_alone() {
        assert_eq!(id("a.json.gz"), id("a.json.gz"));
        assert_ne!(id("a.json.gz"), id("b.json.gz"));
        assert_eq!(id("a").get_version_num(), 5);
    }

    #[test]
    fn a_message_too_large_for_the_queue_is_refused() {
        let table = table("d", "t", None, Dedup::Off);
        let empty = message(&table, "n.json.gz", "").unwrap().to_string().len();
        let most = "x".repeat(MESSAGE_SIZE_MAX - empty);
        assert!(message(&table, "n.json.gz", &most).is_ok());
        let error = message(&table, "n.json.gz", &format!("{most}x")).unwrap_err();
        assert_eq!(error.size, MESSAGE_SIZE_MAX + 1);
    }

    proptest! {
        #[test]
        fn hostile_names_come_back_as_they_were(
            database in any::<String>(), name in any::<String>(), mapping in any::<String>(),
            blob in "[\"\\\\\u{0}-\u{1f}a{}:,]{0,20}", token in any::<String>(),
        ) {
            let table = table(&database, &name, Some(&mapping), Dedup::IngestBy);
            let message = message(&table, &blob, &token).unwrap();
            prop_assert_eq!(&message["DatabaseName"], &Value::from(database));
            prop_assert_eq!(&message["TableName"], &Value::from(name));
            prop_assert_eq!(message.as_object().unwrap().len(), 14);
            let properties = &message["AdditionalProperties"];
            prop_assert_eq!(properties.as_object().unwrap().len(), 6);
            prop_assert_eq!(&properties["ingestionMappingReference"], &Value::from(mapping));
            prop_assert_eq!(&properties["authorizationContext"], &Value::from(token));
            let list: Vec<String> =
                serde_json::from_str(properties["ingestIfNotExists"].as_str().unwrap()).unwrap();
            prop_assert_eq!(list, vec![ingest_by(&blob)]);
        }
    }
}
