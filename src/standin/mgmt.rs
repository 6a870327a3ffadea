//! Kusto's own endpoints: auth metadata and management commands.
//!
//! Before it: a client with a bearer token. After it: V1 datasets and OneApi errors.
//! Thread: the runtime's. Allocates: per answer.
//! Invariant: no command is answered without a token that holds.
//! Not here: queries, and what a command is followed by (`| where …` is read and ignored).
//!
//! Simplified: one address answers for the ingestion endpoint and for the engine.
//! In Azure the resources and the identity token come from the first, everything else from the second.
//! The columns of `.show principal roles` and the error types of missing entities are from memory of the service, not from
//! a document.
//! Source: Kusto documentation, "Query/management HTTP request", "HTTP response", and the page of each command.

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde::Deserialize;
use serde_json::{Value, json};
use uuid::Uuid;

use super::Service;
use super::clock::{later, ticks_text};
use super::fault::Target;
use super::identity::{self, bearer};

/// A command, read as far as the stand-in plays it.
#[derive(Debug, PartialEq, Eq)]
enum Command {
    Resources,
    IdentityToken,
    Version,
    TableSchema { table: String },
    Mappings { table: String, name: Option<String> },
    PrincipalRoles,
    TablePrincipals { table: String },
    Failures,
    Other,
}

#[derive(Deserialize)]
pub(super) struct Request {
    #[serde(default)]
    db: String,
    csl: String,
}

/// Splits a command into words; a quoted name is one word, and so is `['a name']`.
fn words(csl: &str) -> Vec<String> {
    let csl = csl.split('|').next().unwrap_or_default();
    let mut words = Vec::new();
    let mut rest = csl.trim_start();
    while let Some(first) = rest.chars().next() {
        let quoted = ["['", "[\"", "'", "\""]
            .into_iter()
            .find(|open| rest.starts_with(open));
        let (word, end) = match quoted {
            Some(open) => {
                let quote = &open[open.len() - 1..];
                let close = if open.starts_with('[') {
                    format!("{quote}]")
                } else {
                    quote.into()
                };
                let inner = &rest[open.len()..];
                let size = inner.find(&close).unwrap_or(inner.len());
                (
                    &inner[..size],
                    (open.len() + size + close.len()).min(rest.len()),
                )
            }
            None => {
                let size = rest.find(char::is_whitespace).unwrap_or(rest.len());
                (&rest[..size], size.max(first.len_utf8()))
            }
        };
        words.push(word.to_owned());
        rest = rest[end..].trim_start();
    }
    words
}

impl Command {
    fn parse(csl: &str) -> Command {
        let words = words(csl);
        let lower: Vec<String> = words.iter().map(|word| word.to_lowercase()).collect();
        let lower: Vec<&str> = lower.iter().map(String::as_str).collect();
        let table = || words[2].clone();
        match lower[..] {
            [".get" | ".show", "ingestion", "resources"] => Command::Resources,
            [".get", "kusto", "identity", "token"] => Command::IdentityToken,
            [".show", "version"] => Command::Version,
            [".show", "table", _, "cslschema"] => Command::TableSchema { table: table() },
            [".show", "table", _, "ingestion", "mappings"]
            | [".show", "table", _, "ingestion", "json", "mappings"] => Command::Mappings {
                table: table(),
                name: None,
            },
            [".show", "table", _, "ingestion", "json", "mapping", _] => Command::Mappings {
                table: table(),
                name: Some(words[6].clone()),
            },
            [".show", "principal", "roles"] => Command::PrincipalRoles,
            [".show", "table", _, "principals"] => Command::TablePrincipals { table: table() },
            [".show", "ingestion", "failures", ..] => Command::Failures,
            _ => Command::Other,
        }
    }
}

/// What a management request is for.
pub(super) fn target(body: &[u8]) -> Target {
    let Ok(request) = serde_json::from_slice::<Request>(body) else {
        return Target::Management;
    };
    match Command::parse(&request.csl) {
        Command::Resources => Target::Resources,
        Command::IdentityToken => Target::IdentityToken,
        _ => Target::Management,
    }
}

/// Columns as (name, Kusto type).
fn dataset(columns: &[(&str, &str)], rows: Vec<Value>) -> Response {
    let columns: Vec<Value> = columns
        .iter()
        .map(|(name, kind)| {
            let data_type = match *kind {
                "datetime" => "DateTime",
                "guid" => "Guid",
                "bool" => "SByte",
                "int" => "Int32",
                _ => "String",
            };
            json!({"ColumnName": name, "DataType": data_type, "ColumnType": kind})
        })
        .collect();
    Json(json!({"Tables": [{"TableName": "Table_0", "Columns": columns, "Rows": rows}]}))
        .into_response()
}

/// A OneApi error: the body of every 4xx and 5xx but 401.
pub(super) fn refusal(
    status: u16,
    code: &str,
    kind: &str,
    message: &str,
    permanent: bool,
) -> Response {
    let body = json!({"error": {
        "code": code,
        "message": "Request is invalid and cannot be executed.",
        "@type": kind,
        "@message": message,
        "@context": {
            "timestamp": ticks_text(jiff::Timestamp::now()),
            "serviceAlias": "STANDIN",
            "machineName": "KEngine000000",
            "processName": "weir",
            "processId": std::process::id(),
            "threadId": 1,
            "clientRequestId": "",
            "activityId": Uuid::new_v4().to_string(),
            "subActivityId": Uuid::new_v4().to_string(),
            "activityType": "DN.AdminCommand",
            "parentActivityId": Uuid::new_v4().to_string(),
            "activityStack": "",
        },
        "@permanent": permanent,
    }});
    let status = StatusCode::from_u16(status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    (status, Json(body)).into_response()
}

fn missing(kind: &str, name: &str) -> Response {
    let message = format!("Entity ID '{name}' of kind '{kind}' was not found.");
    let exception = "Kusto.Common.Svc.Exceptions.EntityNotFoundException";
    refusal(400, "BadRequest_EntityNotFound", exception, &message, true)
}

/// `GET /v1/rest/auth/metadata`.
pub(super) async fn metadata(State(service): State<Arc<Service>>) -> Response {
    let login = service.uri();
    Json(json!({"AzureAD": {
        "LoginEndpoint": login,
        "LoginMfaRequired": false,
        "KustoClientAppId": "db662dc1-0cfe-4e1c-a843-19a68e65be58",
        "KustoClientRedirectUri": "https://microsoft/kustoclient",
        "KustoServiceResourceId": identity::RESOURCE,
        "FirstPartyAuthorityUrl": format!("{login}/f8cdef31-a31e-4b4a-93e4-5f571e91255a"),
    }}))
    .into_response()
}

/// `POST /v1/rest/mgmt`.
pub(super) async fn command(
    State(service): State<Arc<Service>>,
    headers: HeaderMap,
    body: axum::body::Bytes,
) -> Response {
    let now = service.clock.now();
    if !bearer(&headers).is_some_and(|token| service.tokens.holds(token, now)) {
        let challenge = format!(
            "Bearer authorization_uri=\"{}/{}\"",
            service.uri(),
            service.options.tenant
        );
        return (
            StatusCode::UNAUTHORIZED,
            [(header::WWW_AUTHENTICATE, challenge)],
            "",
        )
            .into_response();
    }
    let Ok(request) = serde_json::from_slice::<Request>(&body) else {
        let message = "The body is not {\"db\":…,\"csl\":…}.";
        return refusal(
            400,
            "BadRequest",
            "Kusto.Common.Svc.Exceptions.BadRequestException",
            message,
            true,
        );
    };
    let command = Command::parse(&request.csl);
    if let Some(refused) = forbid(&service, &command) {
        return refused;
    }
    let catalog = &service.catalog;
    let needs_database = !matches!(
        command,
        Command::Resources | Command::IdentityToken | Command::Version | Command::PrincipalRoles
    );
    if needs_database && !catalog.has_database(&request.db) {
        return missing("Database", &request.db);
    }
    match command {
        Command::Resources => resources(&service),
        Command::IdentityToken => {
            let token = format!("{}.{}==", Uuid::new_v4().simple(), Uuid::new_v4().simple());
            let expires = later(now, service.options.identity_token_lifetime);
            service.identity_tokens.add(token.clone(), expires, now);
            service.journal.secret(token.clone());
            dataset(&[("AuthorizationContext", "string")], vec![json!([token])])
        }
        Command::Version => {
            let columns = [
                ("BuildVersion", "string"),
                ("BuildTime", "datetime"),
                ("ServiceType", "string"),
                ("ProductVersion", "string"),
            ];
            let version = env!("CARGO_PKG_VERSION");
            let time = ticks_text(now);
            dataset(
                &columns,
                vec![json!([version, time, "DataManagement", version])],
            )
        }
        Command::TableSchema { table } => match catalog.schema_text(&request.db, &table) {
            Some(schema) => {
                let names = ["TableName", "Schema", "DatabaseName", "Folder", "DocString"];
                let row = json!([table, schema, request.db, "", ""]);
                dataset(&names.map(|name| (name, "string")), vec![row])
            }
            None => missing("Table", &table),
        },
        Command::Mappings { table, name } => {
            let Some(mappings) = catalog.mappings(&request.db, &table) else {
                return missing("Table", &table);
            };
            let wanted =
                |mapping: &(String, String)| name.as_ref().is_none_or(|name| *name == mapping.0);
            let rows: Vec<Value> = mappings
                .into_iter()
                .filter(wanted)
                .map(|(name, text)| json!([name, "Json", text, ticks_text(now), request.db, table]))
                .collect();
            if let (Some(name), true) = (&name, rows.is_empty()) {
                return missing("MappingPersistent", name);
            }
            let columns = [
                ("Name", "string"),
                ("Kind", "string"),
                ("Mapping", "string"),
                ("LastUpdatedOn", "datetime"),
                ("Database", "string"),
                ("Table", "string"),
            ];
            dataset(&columns, rows)
        }
        Command::PrincipalRoles => {
            let names = ["Scope", "DisplayName", "AADObjectID", "Role"];
            let roles = service.roles.lock().unwrap().clone();
            let id = &service.options.client_id;
            let rows = catalog.databases().into_iter().flat_map(|database| {
                let row =
                    move |role: &String| json!([database, "the stand-in's application", id, role]);
                roles.iter().map(row).collect::<Vec<_>>()
            });
            dataset(&names.map(|name| (name, "string")), rows.collect())
        }
        Command::TablePrincipals { table } => {
            if catalog.schema_text(&request.db, &table).is_none() {
                return missing("Table", &table);
            }
            let names = [
                "Role",
                "PrincipalType",
                "PrincipalDisplayName",
                "PrincipalObjectId",
                "PrincipalFQN",
                "Notes",
            ];
            let (id, tenant) = (&service.options.client_id, &service.options.tenant);
            let rows = service
                .roles
                .lock()
                .unwrap()
                .clone()
                .into_iter()
                .map(|role| {
                    let name = "the stand-in's application";
                    json!([
                        format!("Database {role}"),
                        "AAD Application",
                        name,
                        id,
                        format!("aadapp={id};{tenant}"),
                        ""
                    ])
                });
            dataset(&names.map(|name| (name, "string")), rows.collect())
        }
        Command::Failures => failures(&service),
        Command::Other => {
            let message = format!(
                "Syntax error: the stand-in does not know this command: {}",
                request.csl
            );
            refusal(
                400,
                "BadRequest_SyntaxError",
                "Kusto.Data.Exceptions.SyntaxException",
                &message,
                true,
            )
        }
    }
}

/// The 403 of a command whose role is missing: ingestors do not see schemas, and viewers do not ingest.
fn forbid(service: &Service, command: &Command) -> Option<Response> {
    let viewers = ["User", "Viewer", "Monitor", "Admin"];
    let ingestors = ["Ingestor", "Admin"];
    let all = ["Ingestor", "User", "Viewer", "Monitor", "Admin"];
    let needed: &[&str] = match command {
        Command::Version | Command::PrincipalRoles | Command::Other => return None,
        Command::Resources | Command::IdentityToken => &ingestors,
        Command::Mappings { .. } => &all,
        Command::TableSchema { .. } | Command::TablePrincipals { .. } | Command::Failures => {
            &viewers
        }
    };
    let roles = service.roles.lock().unwrap();
    if roles.iter().any(|role| needed.contains(&role.as_str())) {
        return None;
    }
    let (id, tenant) = (&service.options.client_id, &service.options.tenant);
    let message =
        format!("Principal 'aadapp={id};{tenant}' is not authorized to perform this operation.");
    let kind = "Kusto.Common.Svc.Exceptions.UnauthorizedOperationException";
    Some(refusal(403, "Forbidden", kind, &message, true))
}

fn resources(service: &Service) -> Response {
    let now = service.clock.now();
    let mut resources = match &service.external {
        Some(external) => external.resources(now),
        None => service.storage.resources(now),
    };
    // Clients want to see one. Status tables are not played: nothing answers there.
    resources.push(super::storage::Resource {
        kind: "IngestionsStatusTable",
        uri: format!("{}/account0/ingestionsstatus?sv=none", service.uri()),
        signature: String::new(),
    });
    let rows = resources.into_iter().map(|resource| {
        if !resource.signature.is_empty() {
            service
                .journal
                .secret(super::sas::encode(&resource.signature));
            service.journal.secret(resource.signature);
        }
        json!([resource.kind, resource.uri])
    });
    let columns = [("ResourceTypeName", "string"), ("StorageRoot", "string")];
    dataset(&columns, rows.collect())
}

fn failures(service: &Service) -> Response {
    let columns = [
        ("OperationId", "guid"),
        ("Database", "string"),
        ("Table", "string"),
        ("FailedOn", "datetime"),
        ("IngestionSourcePath", "string"),
        ("Details", "string"),
        ("FailureKind", "string"),
        ("RootActivityId", "guid"),
        ("OperationKind", "string"),
        ("OriginatesFromUpdatePolicy", "bool"),
        ("ErrorCode", "string"),
        ("Principal", "string"),
        ("User", "string"),
        ("IngestionProperties", "string"),
        ("NumberOfSources", "int"),
        ("ShouldRetry", "bool"),
    ];
    let (id, tenant) = (&service.options.client_id, &service.options.tenant);
    let rows = service.engine.failures().into_iter().map(|failure| {
        json!([
            failure.operation_id,
            failure.database,
            failure.table,
            failure.failed_on,
            failure.source_path,
            failure.details,
            failure.failure_kind,
            failure.operation_id,
            "DataIngestPull",
            0,
            failure.error_code,
            format!("aadapp={id};{tenant}"),
            "",
            "",
            1,
            i32::from(failure.should_retry),
        ])
    });
    dataset(&columns, rows.collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_commands_and_quoted_names() {
        assert_eq!(
            Command::parse(" .get  ingestion resources "),
            Command::Resources
        );
        let table = |name: &str| Command::TableSchema { table: name.into() };
        assert_eq!(Command::parse(".show table Logs cslschema"), table("Logs"));
        assert_eq!(
            Command::parse(".show table ['My Logs'] cslschema"),
            table("My Logs")
        );
        assert_eq!(
            Command::parse(".show table [\"L\"] ingestion json mapping \"a b\""),
            Command::Mappings {
                table: "L".into(),
                name: Some("a b".into())
            }
        );
        assert_eq!(
            Command::parse(".show ingestion failures | where x"),
            Command::Failures
        );
        assert_eq!(Command::parse(".drop table Logs"), Command::Other);
        assert_eq!(Command::parse("'"), Command::Other);
        assert_eq!(Command::parse("['é"), Command::Other);
    }
}
