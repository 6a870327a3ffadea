//! The client against a small fake of its services on loopback: faults in, requests and messages out.
//!
//! The fake does what it is told and records what it was sent; it ingests nothing. What a whole service would do with
//! the messages is for the stand-in.

use std::collections::{BTreeMap, VecDeque};
use std::io::Write;
use std::sync::{Arc, Mutex, MutexGuard};

use axum::Router;
use axum::body::Bytes as BodyBytes;
use axum::extract::{Path, RawQuery, State};
use axum::http::{HeaderMap, StatusCode, Uri, header};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post, put};
use base64::Engine;
use base64::engine::general_purpose::{STANDARD, URL_SAFE_NO_PAD};
use bytes::Bytes;
use serde_json::{Value, json};
use tracing_subscriber::fmt::MakeWriter;

use super::online::{Finding, Verdict, walk};
use super::*;
use crate::config::{Dedup, Identity};
use crate::error::{Remedy, UploadStep};
use crate::secret::SecretSource;

/// What the fake does instead of what it was asked.
#[derive(Clone, Debug)]
enum Fault {
    /// Answers with a status, a storage code and a `Retry-After`.
    Status(u16, &'static str, Option<&'static str>),
    /// Answers with a status and this body.
    Body(u16, String),
    /// Does what it was asked, and closes the connection without an answer.
    AcceptUnheard,
    Redirect(String),
}

#[derive(Default)]
struct Record {
    accounts: usize,
    /// The host of the resources; the fake's own where none is set.
    storage_host: Option<String>,
    login: Option<String>,
    /// What the signatures say of their end, if anything.
    sas_lifetime: Option<jiff::SignedDuration>,
    /// Accounts are numbered from here.
    account_first: usize,
    faults: BTreeMap<&'static str, VecDeque<Fault>>,
    token_forms: Vec<BTreeMap<String, String>>,
    /// The `Authorization` fields of management commands.
    authorizations: Vec<String>,
    commands: Vec<Value>,
    /// By path.
    blobs: BTreeMap<String, Vec<u8>>,
    /// Path and query of each put, whether taken or not.
    puts: Vec<(String, HeaderMap)>,
    posts: Vec<String>,
    messages: Vec<Value>,
    /// Counts the lists of resources given out; each has other signatures.
    resource_lists: usize,
}

impl Record {
    fn fault(&mut self, at: &'static str) -> Option<Fault> {
        self.faults.get_mut(at)?.pop_front()
    }
}

#[derive(Clone)]
struct Fake {
    record: Arc<Mutex<Record>>,
    origin: String,
}

impl Fake {
    async fn start(accounts: usize) -> Fake {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let fake = Fake {
            record: Arc::new(Mutex::new(Record {
                accounts,
                ..Record::default()
            })),
            origin: format!("http://{}", listener.local_addr().unwrap()),
        };
        let router = Router::new()
            .route("/v1/rest/auth/metadata", get(auth_metadata))
            .route("/{tenant}/oauth2/v2.0/token", post(issue_token))
            .route("/v1/rest/mgmt", post(manage))
            .route("/{account}/container/{blob}", put(put_blob))
            .route("/{account}/queue/messages", post(post_message))
            .with_state(fake.clone());
        tokio::spawn(async move { axum::serve(listener, router).await });
        fake
    }

    fn record(&self) -> MutexGuard<'_, Record> {
        self.record.lock().unwrap()
    }

    fn plan(&self, at: &'static str, faults: impl IntoIterator<Item = Fault>) {
        self.record().faults.entry(at).or_default().extend(faults);
    }

    fn config(&self, identity: Identity) -> KustoConfig {
        KustoConfig {
            ingest_uri: self.origin.parse().unwrap(),
            identity,
            mode: Mode::Queued,
            trusted_hosts: Vec::new(),
        }
    }
}

/// Carries a planned fault out; `None` where the request is to be answered as asked.
fn planned(fault: Option<Fault>) -> Option<Response> {
    Some(match fault? {
        Fault::Status(status, code, retry_after) => {
            let mut headers = HeaderMap::new();
            if !code.is_empty() {
                headers.insert("x-ms-error-code", code.parse().unwrap());
            }
            if let Some(pause) = retry_after {
                headers.insert(header::RETRY_AFTER, pause.parse().unwrap());
            }
            (StatusCode::from_u16(status).unwrap(), headers).into_response()
        }
        Fault::Body(status, body) => (StatusCode::from_u16(status).unwrap(), body).into_response(),
        Fault::Redirect(to) => {
            (StatusCode::TEMPORARY_REDIRECT, [(header::LOCATION, to)]).into_response()
        }
        // hyper closes the connection of a service that unwinds; this way without a word on stderr.
        Fault::AcceptUnheard => std::panic::resume_unwind(Box::new(())),
    })
}

async fn auth_metadata(State(fake): State<Fake>) -> Response {
    let mut record = fake.record();
    let fault = record.fault("metadata");
    let login = record.login.clone().unwrap_or(fake.origin.clone());
    drop(record);
    planned(fault).unwrap_or_else(|| {
        json!({"AzureAD": {
            "LoginEndpoint": login, "LoginMfaRequired": false,
            "KustoServiceResourceId": "https://kusto.kusto.windows.net",
        }})
        .to_string()
        .into_response()
    })
}

async fn issue_token(
    State(fake): State<Fake>,
    Path(tenant): Path<String>,
    form: String,
) -> Response {
    let mut record = fake.record();
    let pairs = reqwest::Url::parse(&format!("http://form?{form}")).unwrap();
    let mut fields: BTreeMap<String, String> = pairs.query_pairs().into_owned().collect();
    fields.insert("tenant".into(), tenant);
    record.token_forms.push(fields);
    let token = format!("canary-token-{}", record.token_forms.len());
    let fault = record.fault("token");
    drop(record);
    planned(fault).unwrap_or_else(|| {
        json!({"token_type": "Bearer", "expires_in": 3600, "ext_expires_in": 3600,
            "access_token": token})
        .to_string()
        .into_response()
    })
}

async fn manage(State(fake): State<Fake>, headers: HeaderMap, body: String) -> Response {
    let body: Value = serde_json::from_str(&body).unwrap();
    let mut record = fake.record();
    let authorization = headers[header::AUTHORIZATION].to_str().unwrap();
    record.authorizations.push(authorization.into());
    record.commands.push(body.clone());
    let is_engine = body["csl"].as_str().unwrap().starts_with(".show");
    if let Some(fault) = record.fault(if is_engine { "engine" } else { "manage" }) {
        drop(record);
        return planned(Some(fault)).unwrap();
    }
    let table = |columns: &[&str], rows: Vec<Vec<String>>| {
        let columns: Vec<Value> = columns
            .iter()
            .map(|name| json!({"ColumnName": name}))
            .collect();
        let tables = json!([{"TableName": "Table_0", "Columns": columns, "Rows": rows}]);
        json!({ "Tables": tables }).to_string().into_response()
    };
    let one = |name: &str| vec![vec![name.to_owned()]];
    match body["csl"].as_str().unwrap() {
        ".get ingestion resources" => {
            record.resource_lists += 1;
            let list = record.resource_lists;
            let host = record.storage_host.clone().unwrap_or(fake.origin.clone());
            let end = record
                .sas_lifetime
                .map(|lifetime| jiff::Timestamp::now() + lifetime);
            let end = end.map_or(String::new(), |end| format!("&se={end:.0}"));
            let accounts = record.account_first..record.account_first + record.accounts;
            let rows = accounts.flat_map(|account| {
                let root = |object| {
                    format!("{host}/k{account}/{object}?sv=1{end}&sig=canary-sas%2B{list}")
                };
                [
                    vec!["TempStorage".to_owned(), root("container")],
                    vec!["SecuredReadyForAggregationQueue".into(), root("queue")],
                    vec!["Unknown".into(), "".into()],
                ]
            });
            table(&["ResourceTypeName", "StorageRoot"], rows.collect())
        }
        ".get kusto identity token" => table(&["AuthorizationContext"], one("canary-identity==")),
        ".show table ['Logs'] cslschema" => table(&["TableName"], one("Logs")),
        ".show table ['logs'] cslschema" => {
            planned(Some(Fault::Body(400, NOT_FOUND.into()))).unwrap()
        }
        ".show table ['Logs'] ingestion json mappings" => table(&["Name"], one("other")),
        ".show database ['db 1'] ingestion json mappings" => table(&["Name"], one("m1")),
        other => panic!("an unexpected command: {other}"),
    }
}

const NOT_FOUND: &str = r#"{"error": {"code": "BadRequest_EntityNotFound", "@permanent": true,
    "@type": "Kusto.Common.Svc.Exceptions.EntityNotFoundException", "@message": "not found"}}"#;

async fn put_blob(
    State(fake): State<Fake>,
    uri: Uri,
    headers: HeaderMap,
    body: BodyBytes,
) -> Response {
    let mut record = fake.record();
    record.puts.push((uri.to_string(), headers));
    let fault = record.fault("put");
    if !matches!(fault, None | Some(Fault::AcceptUnheard)) {
        drop(record);
        return planned(fault).unwrap();
    }
    let is_new = !record.blobs.contains_key(uri.path());
    if is_new {
        record.blobs.insert(uri.path().into(), body.to_vec());
    }
    drop(record);
    planned(fault).unwrap_or_else(|| match is_new {
        true => StatusCode::CREATED.into_response(),
        false => planned(Some(Fault::Status(409, "BlobAlreadyExists", None))).unwrap(),
    })
}

async fn post_message(
    State(fake): State<Fake>,
    uri: Uri,
    RawQuery(_): RawQuery,
    body: String,
) -> Response {
    let mut record = fake.record();
    record.posts.push(uri.to_string());
    let fault = record.fault("post");
    if !matches!(fault, None | Some(Fault::AcceptUnheard)) {
        drop(record);
        return planned(fault).unwrap();
    }
    let text = body
        .strip_prefix("<?xml version=\"1.0\" encoding=\"utf-8\"?><QueueMessage><MessageText>")
        .and_then(|rest| rest.strip_suffix("</MessageText></QueueMessage>"))
        .expect("the body is exactly one message");
    let json = STANDARD
        .decode(text)
        .expect("the text is base64 with padding");
    record
        .messages
        .push(serde_json::from_slice(&json).expect("the message is JSON and no more"));
    drop(record);
    planned(fault).unwrap_or_else(|| StatusCode::CREATED.into_response())
}

// --- the client -----------------------------------------------------------------------------------

fn secret_file(text: &str) -> (tempfile::NamedTempFile, SecretSource) {
    let mut file = tempfile::NamedTempFile::new().unwrap();
    file.write_all(text.as_bytes()).unwrap();
    let source = SecretSource::File(file.path().into());
    (file, source)
}

fn client_secret(secret: SecretSource) -> Identity {
    Identity::ClientSecret {
        tenant: "contoso.example".into(),
        client_id: "client-1".into(),
        secret,
    }
}

fn tables() -> Vec<Table> {
    vec![Table {
        database: "db 1".into(),
        table: "Logs".into(),
        mapping: Some("m1".into()),
        dedup: Dedup::Off,
        spooled: true,
        delivered: false,
    }]
}

/// The client, and what must live as long.
struct Client {
    kusto: Kusto,
    _secret: tempfile::NamedTempFile,
}

impl Client {
    fn open(fake: &Fake) -> Client {
        let (file, source) = secret_file("canary secret+&=\n");
        let config = fake.config(client_secret(source));
        let kusto = Kusto::open(&config, &tables(), &Handle::current()).unwrap();
        Client {
            kusto,
            _secret: file,
        }
    }

    fn begin(&self, name: &str) -> Delivery {
        self.kusto.begin(BlobMeta {
            name: name.into(),
            table_index: 0,
            size: ROWS.len() as u64,
            raw_size: 123,
            row_count: 1,
            created_at: "2026-11-24T10:00:00Z".parse().unwrap(),
        })
    }
}

/// Waits for new resources, and not for ever: a refresh that nobody asked for never comes.
async fn refreshed(delivery: &Delivery) {
    let patience = std::time::Duration::from_secs(60);
    let waited = tokio::time::timeout(patience, delivery.refreshed()).await;
    waited.expect("a refresh was asked for");
}

/// Not compressed: nobody here reads it.
const ROWS: &[u8] = b"{\"a\":1}\n";
const SOURCE: Bytes = Bytes::from_static(ROWS);
const NAME: &str = "0199-c0-00000012.json.gz";

fn busy(retry_after: Option<&'static str>) -> Fault {
    Fault::Status(503, "ServerBusy", retry_after)
}

fn forbidden() -> Fault {
    Fault::Status(403, "AuthenticationFailed", None)
}

#[tokio::test]
async fn a_delivery_is_a_blob_and_a_message_about_it() {
    let fake = Fake::start(2).await;
    let client = Client::open(&fake);
    client.begin(NAME).attempt(&SOURCE).await.unwrap();
    let record = fake.record();
    let form = &record.token_forms[0];
    assert_eq!(form["client_secret"], "canary secret+&=");
    assert_eq!(form["scope"], "https://kusto.kusto.windows.net/.default");
    assert_eq!(
        (&*form["tenant"], &*form["client_id"]),
        ("contoso.example", "client-1")
    );
    assert_eq!(record.authorizations, ["Bearer canary-token-1"; 2]);
    let (path, blob) = record.blobs.iter().next().unwrap();
    assert_eq!(blob, ROWS);
    assert!(
        path.ends_with("/container/db_1__Logs__0199-c0-00000012.json.gz"),
        "{path}"
    );
    let headers = &record.puts[0].1;
    assert_eq!(headers["if-none-match"], "*");
    assert_eq!(headers["x-ms-blob-type"], "BlockBlob");
    assert_eq!(headers["content-length"], ROWS.len().to_string());
    assert!(headers.get("content-encoding").is_none() && headers.get("authorization").is_none());
    let message = &record.messages[0];
    let blob_path = format!("{}{path}?sv=1&sig=canary-sas%2B1", fake.origin);
    assert_eq!(message["BlobPath"], blob_path);
    assert_eq!(message["Id"], message::id(NAME).to_string());
    assert_eq!(message["RawDataSize"], 123);
    assert_eq!(message["DatabaseName"], "db 1");
    let properties = &message["AdditionalProperties"];
    assert_eq!(properties["authorizationContext"], "canary-identity==");
    assert_eq!(properties["ingestionMappingReference"], "m1");
    assert_eq!(properties["ingestionMappingType"], "Json");
    assert_eq!((record.messages.len(), record.blobs.len()), (1, 1));
}

#[tokio::test]
async fn a_busy_account_moves_traffic_to_others() {
    let fake = Fake::start(3).await;
    fake.plan("put", [busy(None), busy(Some("9"))]);
    fake.plan("post", [busy(Some("9"))]);
    let client = Client::open(&fake);
    client.begin(NAME).attempt(&SOURCE).await.unwrap();
    let record = fake.record();
    let account = |path: &str| path.split('/').nth(1).unwrap().to_owned();
    let accounts: std::collections::BTreeSet<String> =
        record.puts.iter().map(|(path, _)| account(path)).collect();
    assert_eq!((record.puts.len(), accounts.len()), (3, 3));
    assert_ne!(account(&record.posts[0]), account(&record.posts[1]));
}

#[tokio::test]
async fn when_all_are_busy_the_shortest_pause_is_reported() {
    let fake = Fake::start(6).await;
    fake.plan("put", [busy(Some("9")), busy(Some("4")), busy(Some("7"))]);
    let client = Client::open(&fake);
    let mut delivery = client.begin(NAME);
    let error = delivery.attempt(&SOURCE).await.unwrap_err();
    let after = Some(std::time::Duration::from_secs(4));
    assert_eq!(error.remedy, Remedy::Retry { after });
    assert_eq!(
        (error.step, &*error.code),
        (UploadStep::PutBlob, "ServerBusy")
    );
    // No more than three places in one attempt.
    assert_eq!(fake.record().puts.len(), 3);
    delivery.attempt(&SOURCE).await.unwrap();
}

#[tokio::test]
async fn an_unheard_post_is_repeated_word_for_word() {
    let fake = Fake::start(1).await;
    fake.plan("post", [Fault::AcceptUnheard]);
    let client = Client::open(&fake);
    let mut delivery = client.begin(NAME);
    let error = delivery.attempt(&SOURCE).await.unwrap_err();
    assert_eq!(error.remedy, Remedy::Retry { after: None });
    assert_eq!(error.step, UploadStep::PostMessage);
    delivery.attempt(&SOURCE).await.unwrap();
    let record = fake.record();
    assert_eq!(record.messages.len(), 2);
    assert_eq!(record.messages[0], record.messages[1]);
    assert_eq!(record.puts.len(), 1);
}

#[tokio::test]
async fn after_a_crash_the_blob_is_found_where_it_was_put() {
    let fake = Fake::start(5).await;
    let put = Client::open(&fake);
    fake.plan("post", vec![busy(None); 3]);
    put.begin(NAME).attempt(&SOURCE).await.unwrap_err();
    drop(put);
    // A new process knows nothing but the name.
    let client = Client::open(&fake);
    client.begin(NAME).attempt(&SOURCE).await.unwrap();
    let record = fake.record();
    assert_eq!(record.blobs.len(), 1);
    let metrics = client.kusto.delivery_metrics();
    assert_eq!(
        metrics
            .blobs_found
            .load(std::sync::atomic::Ordering::Relaxed),
        1
    );
    let path = record.messages[0]["BlobPath"].as_str().unwrap();
    assert!(path.contains(record.blobs.keys().next().unwrap()), "{path}");
}

#[tokio::test]
async fn a_refused_signature_is_cured_by_a_refresh() {
    let fake = Fake::start(2).await;
    fake.plan("put", vec![forbidden(); 2]);
    let client = Client::open(&fake);
    let mut delivery = client.begin(NAME);
    let error = delivery.attempt(&SOURCE).await.unwrap_err();
    assert_eq!(error.remedy, Remedy::Refresh);
    refreshed(&delivery).await;
    delivery.attempt(&SOURCE).await.unwrap();
    let record = fake.record();
    // The new list has new signatures.
    assert!(record.puts[0].0.ends_with("sig=canary-sas%2B1"));
    assert!(record.puts[2].0.ends_with("sig=canary-sas%2B2"));
}

#[tokio::test]
async fn a_signature_about_to_end_is_exchanged_and_the_path_stays() {
    let fake = Fake::start(1).await;
    let minutes = jiff::SignedDuration::from_mins;
    fake.record().sas_lifetime = Some(minutes(30));
    fake.plan("post", [busy(None), busy(None)]);
    let client = Client::open(&fake);
    let mut delivery = client.begin(NAME);
    delivery.attempt(&SOURCE).await.unwrap_err();
    // The old signature would end before the service has read the blob.
    fake.record().sas_lifetime = Some(minutes(90));
    client.kusto.shared.resources.request();
    refreshed(&delivery).await;
    delivery.attempt(&SOURCE).await.unwrap_err();
    // The next is good for longer than that, and stays.
    client.kusto.shared.resources.request();
    refreshed(&delivery).await;
    delivery.attempt(&SOURCE).await.unwrap();
    let record = fake.record();
    assert_eq!(record.puts.len(), 1);
    let path = record.messages[0]["BlobPath"].as_str().unwrap();
    assert!(path.ends_with("sig=canary-sas%2B2"), "{path}");
    assert!(path.contains(record.blobs.keys().next().unwrap()), "{path}");
}

#[tokio::test]
async fn a_blob_whose_container_goes_is_put_again() {
    let fake = Fake::start(1).await;
    fake.record().sas_lifetime = Some(jiff::SignedDuration::from_mins(30));
    fake.plan("post", [busy(None)]);
    let client = Client::open(&fake);
    let mut delivery = client.begin(NAME);
    delivery.attempt(&SOURCE).await.unwrap_err();
    fake.record().account_first = 7;
    client.kusto.shared.resources.request();
    refreshed(&delivery).await;
    delivery.attempt(&SOURCE).await.unwrap();
    let record = fake.record();
    assert_eq!((record.puts.len(), record.messages.len()), (2, 1));
    let path = record.messages[0]["BlobPath"].as_str().unwrap();
    assert!(path.contains("/k7/container/"), "{path}");
}

#[tokio::test]
async fn a_refused_token_is_renewed_once() {
    let fake = Fake::start(1).await;
    fake.plan("manage", [Fault::Status(401, "", None)]);
    let client = Client::open(&fake);
    client.begin(NAME).attempt(&SOURCE).await.unwrap();
    let expected = [
        "Bearer canary-token-1",
        "Bearer canary-token-2",
        "Bearer canary-token-2",
    ];
    assert_eq!(fake.record().authorizations, expected);
    drop(client);
    // Refused again, it is no matter of tokens.
    fake.plan("manage", vec![Fault::Status(401, "", None); 2]);
    let (_file, source) = secret_file("s");
    let refresher = refresher(&fake.config(client_secret(source))).unwrap();
    let error = refresher.fetch().await.err().unwrap();
    assert_eq!(error.remedy, Remedy::Park);
    assert_eq!(fake.record().authorizations.len(), 5);
}

#[tokio::test]
async fn a_service_that_is_away_at_start_is_waited_for() {
    let fake = Fake::start(1).await;
    fake.plan("metadata", vec![Fault::Status(503, "", None); 3]);
    let client = Client::open(&fake);
    let mut delivery = client.begin(NAME);
    let error = delivery.attempt(&SOURCE).await.unwrap_err();
    assert_eq!(
        (error.remedy, error.step),
        (Remedy::Retry { after: None }, UploadStep::Endpoint)
    );
    assert!(client.kusto.refresh_error().is_some());
    refreshed(&delivery).await;
    delivery.attempt(&SOURCE).await.unwrap();
    assert_eq!(client.kusto.refresh_error(), None);
}

#[tokio::test]
async fn what_is_never_taken_is_not_tried_elsewhere() {
    let fake = Fake::start(3).await;
    fake.plan("put", [Fault::Status(400, "InvalidHeaderValue", None)]);
    let client = Client::open(&fake);
    let error = client.begin(NAME).attempt(&SOURCE).await.unwrap_err();
    assert_eq!(
        (error.remedy, &*error.code),
        (Remedy::DeadLetter, "InvalidHeaderValue")
    );
    let mut empty = client.kusto.begin(BlobMeta {
        raw_size: 0,
        ..client.begin(NAME).blob().clone()
    });
    let error = empty.attempt(&SOURCE).await.unwrap_err();
    assert_eq!(
        (error.remedy, &*error.code),
        (Remedy::DeadLetter, "blob_empty")
    );
    assert_eq!(fake.record().puts.len(), 1);
}

#[tokio::test]
async fn a_blob_is_streamed_again_for_each_place() {
    struct Pieces;
    impl BlobSource for Pieces {
        fn body(&self) -> std::io::Result<reqwest::Body> {
            let pieces = ROWS.chunks(3).map(Ok::<_, std::io::Error>);
            Ok(reqwest::Body::wrap_stream(futures_util::stream::iter(
                pieces,
            )))
        }
    }
    let fake = Fake::start(2).await;
    fake.plan("put", [busy(None)]);
    let client = Client::open(&fake);
    client.begin(NAME).attempt(&Pieces).await.unwrap();
    let record = fake.record();
    assert_eq!(record.blobs.values().next().unwrap(), ROWS);
    for (_, headers) in &record.puts {
        assert_eq!(headers["content-length"], ROWS.len().to_string());
        assert!(headers.get("transfer-encoding").is_none());
    }
}

#[tokio::test]
async fn nothing_goes_to_hosts_that_are_not_trusted() {
    let other = Fake::start(1).await;
    let fake = Fake::start(1).await;
    // The endpoint sends weir elsewhere by a redirect.
    fake.plan(
        "manage",
        [Fault::Redirect(format!("{}/v1/rest/mgmt", other.origin))],
    );
    let (_file, source) = secret_file("s");
    let config = fake.config(client_secret(source));
    let error = refresher(&config).unwrap().fetch().await.err().unwrap();
    assert!(error.detail.contains("redirects"), "{error}");
    fake.plan(
        "put",
        [Fault::Redirect(format!("{}/k0/container/b", other.origin))],
    );
    let client = Client::open(&fake);
    let error = client.begin(NAME).attempt(&SOURCE).await.unwrap_err();
    assert!(error.detail.contains("redirect"), "{error}");
    // By its list of resources.
    fake.record().storage_host = Some("https://evil.example".into());
    let error = refresher(&config).unwrap().fetch().await.err().unwrap();
    assert_eq!(
        (error.remedy, &*error.code),
        (Remedy::Park, "resources_missing")
    );
    assert!(error.detail.contains("evil.example"), "{error}");
    // By its login endpoint: not even a token is asked for.
    let forms = fake.record().token_forms.len();
    fake.record().login = Some("https://evil.example".into());
    let error = refresher(&config).unwrap().fetch().await.err().unwrap();
    assert_eq!(
        (error.remedy, &*error.code),
        (Remedy::Park, "host_untrusted")
    );
    assert_eq!(fake.record().token_forms.len(), forms);
    let other = other.record();
    assert!(other.commands.is_empty() && other.puts.is_empty() && other.token_forms.is_empty());
}

#[tokio::test]
async fn a_refused_identity_says_so_in_the_services_words() {
    let fake = Fake::start(1).await;
    let body = json!({"error": "invalid_client", "error_codes": [7000215],
        "error_description": "AADSTS7000215: Invalid client secret provided."});
    fake.plan("token", [Fault::Body(401, body.to_string())]);
    let (_file, source) = secret_file("canary");
    let refresher = refresher(&fake.config(client_secret(source))).unwrap();
    let error = refresher.fetch().await.err().unwrap();
    assert_eq!(
        (error.remedy, error.step),
        (Remedy::Park, UploadStep::Token)
    );
    assert_eq!(error.code, "AADSTS7000215");
    assert!(
        error.detail.contains("Invalid client secret") && error.detail.contains("expiry"),
        "{error}"
    );
    assert!(!error.detail.contains("canary"), "{error}");
}

#[tokio::test]
async fn a_login_endpoint_that_is_away_is_tried_again() {
    let fake = Fake::start(1).await;
    // Port 1 of loopback: nobody listens there.
    fake.record().login = Some("http://127.0.0.1:1".into());
    let (_file, source) = secret_file("canary");
    let refresher = refresher(&fake.config(client_secret(source))).unwrap();
    let error = refresher.fetch().await.err().unwrap();
    assert_eq!(
        (error.remedy, error.step),
        (Remedy::Retry { after: None }, UploadStep::Token)
    );
    assert!(error.detail.contains("not_connected"), "{error}");
}

#[tokio::test]
async fn assertions_stand_in_for_a_secret() {
    let fake = Fake::start(1).await;
    let (token_file, _) = secret_file(" canary.federated.token\n");
    let workload = Identity::Workload {
        tenant: Some("t".into()),
        client_id: Some("c".into()),
        token_file: Some(token_file.path().into()),
    };
    refresher(&fake.config(workload))
        .unwrap()
        .fetch()
        .await
        .unwrap();
    let key = rcgen::KeyPair::generate_rsa_for(&rcgen::PKCS_RSA_SHA256, rcgen::RsaKeySize::_2048)
        .unwrap();
    let parameters = rcgen::CertificateParams::new(["weir.example".to_owned()]).unwrap();
    let pem = parameters.self_signed(&key).unwrap().pem() + &key.serialize_pem();
    let (_certificate_file, certificate) = secret_file(&pem);
    let certificate = Identity::ClientCertificate {
        tenant: "t".into(),
        client_id: "c".into(),
        certificate,
    };
    refresher(&fake.config(certificate))
        .unwrap()
        .fetch()
        .await
        .unwrap();
    let record = fake.record();
    let kind = "urn:ietf:params:oauth:client-assertion-type:jwt-bearer";
    for form in &record.token_forms {
        assert_eq!(form["client_assertion_type"], kind);
        assert_eq!(form["grant_type"], "client_credentials");
        assert!(!form.contains_key("client_secret"));
    }
    assert_eq!(
        record.token_forms[0]["client_assertion"],
        "canary.federated.token"
    );
    let assertion = &record.token_forms[1]["client_assertion"];
    let claims = URL_SAFE_NO_PAD
        .decode(assertion.split('.').nth(1).unwrap())
        .unwrap();
    let claims: Value = serde_json::from_slice(&claims).unwrap();
    assert_eq!(
        claims["aud"],
        format!("{}/t/oauth2/v2.0/token", fake.origin)
    );
}

// --- weir check --online --------------------------------------------------------------------------

async fn findings(fake: &Fake, tables: &[Table]) -> Vec<Finding> {
    let (_file, source) = secret_file("s");
    let config = fake.config(client_secret(source));
    let mut findings = Vec::new();
    walk(&config, tables, &mut |finding| findings.push(finding))
        .await
        .unwrap();
    findings
}

#[track_caller]
fn verdicts(findings: &[Finding]) -> Vec<(&'static str, Verdict)> {
    findings
        .iter()
        .map(|finding| (finding.step, finding.verdict))
        .collect()
}

#[tokio::test]
async fn the_walk_ends_with_a_blob_and_ingests_nothing() {
    let fake = Fake::start(2).await;
    let found = findings(&fake, &tables()).await;
    let steps = [
        "endpoint",
        "token",
        "resources",
        "table",
        "mapping",
        "blob",
        "blob",
    ];
    assert_eq!(
        verdicts(&found),
        steps.map(|step| (step, Verdict::Ok)),
        "{found:?}"
    );
    let record = fake.record();
    assert!(record.messages.is_empty() && record.blobs.len() == 2);
}

#[tokio::test]
async fn the_walk_says_what_is_missing() {
    let fake = Fake::start(1).await;
    let wrong = |table: &str, mapping: &str| Table {
        table: table.into(),
        mapping: Some(mapping.into()),
        ..tables().remove(0)
    };
    let found = findings(&fake, &[wrong("logs", "m1"), wrong("Logs", "m2")]).await;
    assert_eq!(
        verdicts(&found)[3..],
        [
            ("table", Verdict::Failed),
            ("table", Verdict::Ok),
            ("mapping", Verdict::Failed),
            ("blob", Verdict::Ok)
        ]
    );
    assert!(
        found[3].detail.contains("there is no db 1.logs"),
        "{found:?}"
    );
    assert!(found[5].detail.contains("no JSON mapping m2"), "{found:?}");

    fake.plan("manage", [Fault::Body(403, "{}".into())]);
    let found = findings(&fake, &[]).await;
    assert_eq!(found.last().unwrap().verdict, Verdict::Failed);
    assert!(
        found.last().unwrap().detail.contains("ingestors"),
        "{found:?}"
    );

    // An ingestor may not look.
    let unauthorized = || Fault::Body(403, "{}".into());
    fake.plan("engine", [unauthorized(), unauthorized()]);
    let found = findings(&fake, &tables()).await;
    assert_eq!(
        verdicts(&found)[3..5],
        [("table", Verdict::Unknown), ("mapping", Verdict::Unknown)]
    );
    assert!(found[3].detail.contains("viewer"), "{found:?}");

    fake.plan("put", [forbidden()]);
    let found = findings(&fake, &[]).await;
    assert!(found.last().unwrap().detail.contains("clock"), "{found:?}");

    fake.plan(
        "metadata",
        [Fault::Body(200, "<html>a portal</html>".into())],
    );
    let found = findings(&fake, &tables()).await;
    assert_eq!(verdicts(&found), [("endpoint", Verdict::Failed)]);
    assert!(
        found[0].detail.contains("destination.ingest_uri"),
        "{found:?}"
    );
}

// --- secrets --------------------------------------------------------------------------------------

#[derive(Clone, Default)]
struct Log(Arc<Mutex<Vec<u8>>>);

impl Write for Log {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().unwrap().extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

impl<'a> MakeWriter<'a> for Log {
    type Writer = Log;

    fn make_writer(&'a self) -> Log {
        self.clone()
    }
}

#[tokio::test]
async fn no_secret_is_in_any_line_at_trace_level() {
    // Also what the libraries say through `log`; without a subscriber of its own a test prints none of it.
    tracing_log::LogTracer::init().unwrap();
    let log = Log::default();
    let subscriber = tracing_subscriber::fmt()
        .with_max_level(tracing::Level::TRACE)
        .with_writer(log.clone())
        .finish();
    let _subscriber = tracing::subscriber::set_default(subscriber);
    let fake = Fake::start(2).await;
    fake.plan("manage", [Fault::Status(401, "", None), busy(None)]);
    fake.plan("put", vec![forbidden(); 2]);
    fake.plan("post", [Fault::AcceptUnheard, busy(None)]);
    let client = Client::open(&fake);
    let mut delivery = client.begin(NAME);
    let mut errors = Vec::new();
    while let Err(error) = delivery.attempt(&SOURCE).await {
        if error.remedy == Remedy::Refresh || error.step == UploadStep::Resources {
            refreshed(&delivery).await;
        }
        errors.push(format!("{error} {error:?}"));
        assert!(errors.len() < 10, "{error}");
    }
    assert_eq!(fake.record().messages.len(), 2);
    let log = String::from_utf8(log.0.lock().unwrap().clone()).unwrap();
    assert!(
        log.contains("TRACE") && log.contains("the token was refused"),
        "{log}"
    );
    for line in log.lines().chain(errors.iter().map(String::as_str)) {
        assert!(!line.contains("canary"), "{line}");
    }
}
