//! The walk of `weir check --online`: every step that a delivery needs, tried once, in order.
//!
//! Before it: the configuration is valid.
//! After it: each step is ok, or says what is wrong and what to change.
//! Thread: the runtime of the command. Allocates: freely, once.
//! Invariant: nothing is ingested: the walk ends with a blob that no message names, and which the service clears away
//! with its container. A step after one that failed is not tried.
//! Not here: the queue. A message is the one thing that cannot be tried without being acted upon.

use std::time::Instant;

use bytes::Bytes;

use super::management::{CommandError, Endpoint, Rows};
use super::ranking::Ranking;
use super::resources::Refresher;
use super::storage;
use super::token::Token;
use super::{refresher, request_id};
use crate::config::{KustoConfig, Table};
use crate::error::{Fatal, UploadError, UploadStep};
use crate::limits::{CLOCK_SKEW_MAX, STORAGE_ATTEMPT_COUNT};

/// One gzip member without content (RFC 1952): what the tiny blob holds.
const TINY_BLOB: &[u8] = &[
    0x1f, 0x8b, 8, 0, 0, 0, 0, 0, 0, 0xff, 3, 0, 0, 0, 0, 0, 0, 0, 0, 0,
];

/// What a step found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finding {
    pub verdict: Verdict,
    /// `endpoint`, `token`, `resources`, `table`, `mapping` or `blob`.
    pub step: &'static str,
    /// What was found, or what is wrong and what to change; one line.
    pub detail: String,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    Ok,
    /// Deliveries may work; this could not be seen.
    Unknown,
    Failed,
}

/// Walks, and hands each finding over as it is found.
pub async fn walk(
    config: &KustoConfig,
    tables: &[Table],
    found: &mut dyn FnMut(Finding),
) -> Result<(), Fatal> {
    let refresher = refresher(config)?;
    let mut note = |verdict, step, detail: String| {
        found(Finding {
            verdict,
            step,
            detail,
        });
    };
    let endpoint = &refresher.endpoint;
    match endpoint.auth_metadata().await {
        Ok(metadata) => {
            let login = metadata.login.host_str().unwrap_or_default();
            let detail = format!("{} answers; log in at {login}", endpoint.host());
            note(Verdict::Ok, "endpoint", detail);
            let skew = metadata.clock_skew.unwrap_or_default().as_secs();
            if skew.unsigned_abs() > CLOCK_SKEW_MAX.as_secs() {
                let detail = format!(
                    "this machine's clock is {} s {} the service's, which will refuse its tokens and \
                     signatures; synchronise it",
                    skew.unsigned_abs(),
                    if skew > 0 { "ahead of" } else { "behind" }
                );
                note(Verdict::Failed, "endpoint", detail);
            }
        }
        Err(error) => {
            note(Verdict::Failed, "endpoint", explain(&error));
            return Ok(());
        }
    }
    let token = match refresher.tokens.token().await {
        Ok(token) => token,
        Err(error) => {
            note(Verdict::Failed, "token", explain(&error));
            return Ok(());
        }
    };
    let minutes = token.lifetime().as_secs() / 60;
    note(Verdict::Ok, "token", format!("valid for {minutes} minutes"));
    let resources = refresher.fetch().await;
    match &resources {
        Ok(resources) => {
            let (containers, queues) = (resources.containers.len(), resources.queues.len());
            let detail = format!("{containers} containers, {queues} queues, an identity token");
            note(Verdict::Ok, "resources", detail);
        }
        Err(error) => note(Verdict::Failed, "resources", explain(error)),
    }
    let engine = endpoint.engine();
    for table in tables {
        look_at_table(&engine, &token, table, &mut note).await;
    }
    if let Ok(resources) = &resources {
        put_tiny_blob(&refresher, &resources.containers, &mut note).await;
    }
    Ok(())
}

type Note<'a> = dyn FnMut(Verdict, &'static str, String) + 'a;

/// Looks for the table and its mapping on the query endpoint.
async fn look_at_table(endpoint: &Endpoint, token: &Token, table: &Table, note: &mut Note<'_>) {
    let (database, name) = (&table.database, &table.table);
    let run = |command: String| async move {
        let step = UploadStep::Resources;
        endpoint.command(token, database, &command, step).await
    };
    let what = format!("{database}.{name}");
    match run(format!(".show table {} cslschema", quoted(name))).await {
        Ok(rows) if has(&rows, "TableName", name) => {
            note(Verdict::Ok, "table", format!("{what} is there"));
        }
        Err(failed) if !failed.is_not_found() => {
            let (verdict, detail) = unseen(&failed, &what);
            note(verdict, "table", detail);
        }
        _ => {
            let detail = format!(
                "there is no {what}; docs/KUSTO.md has the command that creates a table, or change \
                 route.database or route.table (names are case-sensitive)"
            );
            note(Verdict::Failed, "table", detail);
            return;
        }
    }
    let Some(mapping) = &table.mapping else {
        return;
    };
    let of_table = run(format!(
        ".show table {} ingestion json mappings",
        quoted(name)
    ))
    .await;
    let of_table = match of_table.map(|rows| has(&rows, "Name", mapping)) {
        Ok(found) => found,
        Err(failed) => {
            let (verdict, detail) = unseen(&failed, mapping);
            note(verdict, "mapping", detail);
            return;
        }
    };
    // A mapping of the database serves its tables too.
    let of_database = format!(
        ".show database {} ingestion json mappings",
        quoted(database)
    );
    if of_table
        || run(of_database)
            .await
            .is_ok_and(|rows| has(&rows, "Name", mapping))
    {
        note(Verdict::Ok, "mapping", format!("{mapping} is there"));
        return;
    }
    let detail = format!(
        "{what} has no JSON mapping {mapping}; docs/KUSTO.md has the command that creates one, or \
         change route.mapping (names are case-sensitive)"
    );
    note(Verdict::Failed, "mapping", detail);
}

/// Whether a row has this text in this column.
fn has(rows: &Rows, column: &str, text: &str) -> bool {
    let mut found = rows.texts([column]).into_iter().flatten();
    found.any(|[value]| value == text)
}

/// A name in a command. Source: "Entity names", section "Reference rules".
fn quoted(name: &str) -> String {
    format!("['{}']", name.replace('\\', "\\\\").replace('\'', "\\'"))
}

/// Why something could not be looked at. An ingestor may ingest without being allowed to look.
fn unseen(failed: &CommandError, what: &str) -> (Verdict, String) {
    match failed.status {
        Some(403) => {
            let detail = format!(
                "{what} cannot be seen by this identity, which ingesting does not need; to let this \
                 check see it, make the identity a viewer of the database"
            );
            (Verdict::Unknown, detail)
        }
        _ => (
            Verdict::Failed,
            format!("{what}: {}", explain(&failed.error)),
        ),
    }
}

async fn put_tiny_blob(
    refresher: &Refresher,
    containers: &[crate::secret::SasUrl],
    note: &mut Note<'_>,
) {
    let name = format!("weir-check__{}.json.gz", request_id().replace(';', "-"));
    let now = Instant::now();
    let order = Ranking::new(now).order(containers, &name, now);
    for container in order.into_iter().take(STORAGE_ATTEMPT_COUNT) {
        let body = Bytes::from_static(TINY_BLOB).into();
        let blob = container.join(&name);
        let size = TINY_BLOB.len() as u64;
        match storage::put_blob(refresher.endpoint.http(), &blob, body, size).await {
            Ok(_) => {
                note(
                    Verdict::Ok,
                    "blob",
                    format!("{} takes blobs", container.place()),
                );
            }
            Err(error) => note(Verdict::Failed, "blob", explain(&error)),
        }
    }
}

/// The error with what to change, where its code alone tells.
fn explain(error: &UploadError) -> String {
    let hint = match error.code.as_str() {
        "name_not_resolved" => {
            "; check the name, and in a private network that its DNS has the private endpoint's zones"
        }
        "not_connected" | "timeout" => "; check that a firewall or proxy lets weir through",
        "AuthenticationFailed" => {
            "; the signature was just issued, so check this machine's clock first"
        }
        _ => "",
    };
    format!("{} ({}){hint}", error.detail, error.code)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;

    #[test]
    fn names_are_quoted_in_commands() {
        assert_eq!(quoted("Logs"), "['Logs']");
        assert_eq!(quoted(r"a'] | x \"), r"['a\'] | x \\']");
    }

    #[test]
    fn the_tiny_blob_is_a_gzip_member() {
        let mut content = Vec::new();
        let mut decoder = flate2::read::GzDecoder::new(TINY_BLOB);
        assert_eq!(decoder.read_to_end(&mut content).unwrap(), 0);
    }
}
