//! The stand-in's own pages: what landed, what failed, what was seen.
//!
//! Before it: a person with curl, or a test in another language. After it: JSON and NDJSON.
//! Thread: the runtime's. Allocates: per page.
//! Invariant: they only read.
//! Not here: anything that Azure has.

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use axum::http::{StatusCode, Uri, header};
use axum::response::{IntoResponse, Response};
use serde_json::{Value, json};

use super::Service;
use super::storage::Query;

/// Rows shown where the query does not say how many.
const ROW_COUNT_DEFAULT: usize = 10;

fn ndjson(lines: Vec<String>) -> Response {
    let mut body = lines.join("\n");
    if !body.is_empty() {
        body.push('\n');
    }
    ([(header::CONTENT_TYPE, "application/x-ndjson")], body).into_response()
}

/// `GET /rows?database=&table=&n=`: the newest n rows, the newest last.
pub(super) async fn rows(State(service): State<Arc<Service>>, uri: Uri) -> Response {
    let query = Query::of(&uri);
    let (Some(database), Some(table)) = (query.get("database"), query.get("table")) else {
        let hint = "say which: /rows?database=DATABASE&table=TABLE&n=COUNT\n";
        return (StatusCode::BAD_REQUEST, hint).into_response();
    };
    let count = query.get("n").map_or(Ok(ROW_COUNT_DEFAULT), str::parse);
    let Ok(count) = count else {
        return (StatusCode::BAD_REQUEST, "n is a number\n").into_response();
    };
    match service.catalog.rows(database, table, count) {
        Some(rows) => ndjson(rows),
        None => (
            StatusCode::NOT_FOUND,
            "there is no such table; see /state\n",
        )
            .into_response(),
    }
}

/// `GET /failures`: every failure kept, the newest last.
pub(super) async fn failures(State(service): State<Arc<Service>>) -> Response {
    let failures = service.engine.failures().into_iter().map(|failure| {
        json!({
            "OperationId": failure.operation_id,
            "Database": failure.database,
            "Table": failure.table,
            "FailedOn": failure.failed_on,
            "IngestionSourceId": failure.source_id,
            "IngestionSourcePath": failure.source_path,
            "Details": failure.details,
            "FailureKind": failure.failure_kind,
            "ErrorCode": failure.error_code,
            "ShouldRetry": failure.should_retry,
        })
        .to_string()
    });
    ndjson(failures.collect())
}

/// `GET /messages`: the JSON of every ingestion message kept, secrets included, the newest last.
pub(super) async fn messages(State(service): State<Arc<Service>>) -> Response {
    ndjson(service.journal.messages())
}

/// `GET /state`: totals and violations.
pub(super) async fn state(State(service): State<Arc<Service>>) -> Json<Value> {
    let tables = service
        .catalog
        .all_counts()
        .into_iter()
        .map(|(database, table, counts)| {
            json!({
                "database": database,
                "table": table,
                "rows": counts.rows,
                "raw_size": counts.raw_size,
                "blobs": counts.blobs,
                "lines_skipped": counts.lines_skipped,
                "values_nulled": counts.values_nulled,
                "duplicates": counts.duplicates,
                "skipped_by_tag": counts.skipped_by_tag,
            })
        });
    let tables: Vec<Value> = tables.collect();
    let (blob_count, blobs_size) = service.storage.blobs.count_and_size();
    Json(json!({
        "tables": tables,
        "failures": service.engine.failure_count(),
        "messages": service.journal.message_count(),
        "messages_waiting": service.storage.queues.message_count(),
        "idle": service.is_settled(),
        "requests": service.journal.request_count(),
        "blobs_held": blob_count,
        "blobs_held_size": blobs_size,
        "violation_count": service.journal.violation_count(),
        "violations": service.journal.violations(),
    }))
}
