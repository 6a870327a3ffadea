//! The stand-in keeps the contract that weir is tested against: each rule is broken here once.

#[path = "support/standin.rs"]
mod support;

use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::{STANDARD, URL_SAFE_NO_PAD};
use serde_json::{Value, json};
use support::{Bench, DATABASE, PATIENCE, TABLE, blob_uri, gzip, row};
use weir::standin::{Action, Batching, Fault, Members, StandinOptions, TableOptions, Target};

const HOUR: Duration = Duration::from_secs(3600);

fn bench() -> Bench {
    Bench::start(StandinOptions::default())
}

fn fault(target: Target, times: usize, action: Action) -> Fault {
    Fault {
        target,
        account: None,
        times,
        action,
    }
}

/// Whether nothing listens where the URI points.
fn is_refused(uri: &str) -> bool {
    let address = uri.split('/').nth(2).unwrap();
    let refused = std::net::TcpStream::connect(address).map_err(|error| error.kind());
    matches!(refused, Err(std::io::ErrorKind::ConnectionRefused))
}

// --- identity -----------------------------------------------------------------------------

#[test]
fn the_token_endpoint_checks_every_field() {
    let bench = bench();
    let good = bench.token_answer(&[]).json();
    assert_eq!(good["token_type"], "Bearer");
    assert_eq!(good["expires_in"], 3599);
    for (change, status, error) in [
        (("client_secret", "wrong"), 401, "invalid_client"),
        (("client_id", "wrong"), 400, "unauthorized_client"),
        (("grant_type", "password"), 400, "unsupported_grant_type"),
        (
            ("scope", "https://kusto.kusto.windows.net"),
            400,
            "invalid_resource",
        ),
        (
            ("scope", "https://vault.azure.net/.default"),
            400,
            "invalid_resource",
        ),
    ] {
        let answer = bench.token_answer(&[change]);
        assert_eq!(answer.status, status, "{change:?}");
        let body = answer.json();
        assert_eq!(body["error"], error, "{change:?}");
        assert!(
            body["error_description"]
                .as_str()
                .unwrap()
                .starts_with("AADSTS")
        );
    }
}

#[test]
fn client_assertions_are_checked_by_their_claims() {
    let bench = Bench::start(StandinOptions {
        federated_token: Some("the.federated.token".into()),
        ..StandinOptions::default()
    });
    let options = bench.standin.options();
    let (id, tenant) = (&options.client_id, &options.tenant);
    let endpoint = format!(
        "{}/{tenant}/oauth2/v2.0/token",
        bench.standin.token_authority()
    );
    let claims =
        json!({"iss": id, "sub": id, "aud": endpoint, "jti": "1", "exp": 4_000_000_000_u64});
    let ask = |assertion: &str| {
        let kind = "urn:ietf:params:oauth:client-assertion-type:jwt-bearer";
        let form = [
            ("client_assertion_type", kind),
            ("client_assertion", assertion),
            ("client_secret", ""),
        ];
        bench.token_answer(&form).status
    };
    let jwt = |claims: &Value| format!("e30.{}.c2ln", URL_SAFE_NO_PAD.encode(claims.to_string()));
    assert_eq!(ask("the.federated.token"), 200);
    assert_eq!(ask(&jwt(&claims)), 200);
    for (claim, value) in [
        ("aud", json!("other")),
        ("sub", json!("other")),
        ("exp", json!(1)),
        ("jti", json!("")),
    ] {
        let mut claims = claims.clone();
        claims[claim] = value;
        assert_eq!(ask(&jwt(&claims)), 401, "{claim}");
    }
    assert_eq!(ask("no jwt"), 401);
}

#[test]
fn imds_wants_its_header_and_answers_in_strings() {
    let bench = bench();
    let uri = bench.uri(
        "/metadata/identity/oauth2/token?api-version=2018-02-01&resource=https%3A%2F%2Fkusto.kusto.windows.net",
    );
    assert_eq!(bench.get(&uri).status, 400);
    let answer = bench
        .send(bench.http.get(&uri).header("Metadata", "true"))
        .unwrap()
        .json();
    assert_eq!(answer["expires_in"], "3599");
    let token = answer["access_token"].as_str().unwrap();
    assert_eq!(bench.command_with(token, ".show version").status, 200);
}

#[test]
fn tokens_expire_by_the_stand_ins_clock() {
    let bench = bench();
    let token = bench.token();
    assert_eq!(bench.command_with(&token, ".show version").status, 200);
    bench.standin.advance(HOUR);
    let refused = bench.command_with(&token, ".show version");
    assert_eq!(refused.status, 401);
    assert!(
        refused
            .header("www-authenticate")
            .starts_with("Bearer authorization_uri=")
    );
    let token = bench.token();
    assert_eq!(bench.command_with(&token, ".show version").status, 200);
    bench.standin.expire_tokens();
    assert_eq!(bench.command_with(&token, ".show version").status, 401);
    assert_eq!(bench.command_with("made up", ".show version").status, 401);
}

// --- management ---------------------------------------------------------------------------

#[test]
fn metadata_names_the_login_endpoint() {
    let bench = bench();
    let metadata = bench.get(&bench.uri("/v1/rest/auth/metadata")).json();
    assert_eq!(
        metadata["AzureAD"]["LoginEndpoint"],
        bench.standin.token_authority()
    );
    assert_eq!(
        metadata["AzureAD"]["KustoServiceResourceId"],
        "https://kusto.kusto.windows.net"
    );
}

#[test]
fn resources_are_many_fresh_and_as_long_as_asked() {
    let bench = Bench::start(StandinOptions {
        account_count: 6,
        sas_size: 300,
        ..StandinOptions::default()
    });
    let answer = bench.command(".show ingestion resources").json();
    assert_eq!(
        answer["Tables"][0]["Columns"][1]["ColumnName"],
        "StorageRoot"
    );
    let containers = bench.resources("TempStorage");
    assert_eq!(containers.len(), 12);
    assert_eq!(bench.resources("SecuredReadyForAggregationQueue").len(), 12);
    let sas = |uri: &str| uri.split_once('?').unwrap().1.to_owned();
    assert!(containers.iter().all(|uri| sas(uri).len() >= 300));
    assert!(containers[11].contains("/account5/"));
    let again = bench.resources("TempStorage");
    assert_ne!(sas(&containers[0]), sas(&again[0]));
}

#[test]
fn show_commands_answer_what_a_check_asks() {
    let bench = bench();
    let schema = bench.rows_of(".show table Events cslschema");
    assert_eq!(schema[0][1], "timestamp:datetime, tag:string, log:dynamic");
    assert_eq!(schema[0][2], DATABASE);
    let mappings = bench.rows_of(".show table ['Records'] ingestion json mappings");
    assert_eq!(
        (&mappings[0][0], &mappings[0][1]),
        (&json!("record_v1"), &json!("Json"))
    );
    let roles = bench.rows_of(".show principal roles");
    assert_eq!(roles[0][3], "Ingestor");
    for csl in [
        ".show table Nope cslschema",
        ".show table Events ingestion json mapping \"nope\"",
        ".show table Nope principals",
    ] {
        let answer = bench.command(csl);
        assert_eq!(answer.status, 400, "{csl}");
        assert_eq!(answer.json()["error"]["code"], "BadRequest_EntityNotFound");
        assert_eq!(answer.json()["error"]["@permanent"], true);
    }
}

#[test]
fn a_missing_role_is_forbidden() {
    let bench = bench();
    bench.standin.set_roles(&["Viewer"]);
    let answer = bench.command(".get ingestion resources");
    assert_eq!(answer.status, 403);
    assert_eq!(answer.json()["error"]["code"], "Forbidden");
    bench.standin.set_roles(&["Ingestor"]);
    assert_eq!(bench.command(".get ingestion resources").status, 200);
    assert_eq!(bench.command(".show table Events cslschema").status, 403);
}

// --- blobs --------------------------------------------------------------------------------

#[test]
fn a_blob_is_stored_once_and_read_back() {
    let bench = bench();
    let uri = bench.upload("a b.json".replace(' ', "%20").as_str(), b"content");
    assert_eq!(bench.get(&uri).body, b"content");
    let head = bench.send(bench.http.head(&uri)).unwrap();
    assert_eq!((head.status, head.header("content-length")), (200, "7"));
    let again = bench.put(&uri, "other").header("If-None-Match", "*");
    assert_eq!(
        bench.send(again).unwrap().error(),
        (409, "BlobAlreadyExists")
    );
    assert_eq!(bench.send(bench.put(&uri, "other")).unwrap().status, 201);
    assert_eq!(bench.get(&uri).body, b"other");
    let missing = blob_uri(&bench.container(), "missing");
    assert_eq!(bench.get(&missing).error(), (404, "BlobNotFound"));
}

#[test]
fn a_blob_needs_a_signature_that_holds() {
    let bench = bench();
    let put = |uri: &str| bench.send(bench.put(uri, "x")).unwrap();
    let uri = blob_uri(&bench.container(), "x.json");
    assert_eq!(
        put(uri.split('?').next().unwrap()).error(),
        (401, "NoAuthenticationInformation")
    );
    assert_eq!(
        put(&uri.replace("sp=rwd", "sp=rwdl")).error(),
        (403, "AuthenticationFailed")
    );
    assert_eq!(
        put(&uri.replace("-0/", "-1/")).error(),
        (403, "AuthenticationFailed")
    );
    assert_eq!(put(&uri).status, 201);
    let body = put(&uri.replace("sig=", "sig=A")).text();
    assert!(body.contains("<Code>AuthenticationFailed</Code>"), "{body}");

    bench.standin.expire_sas();
    assert_eq!(put(&uri).error(), (403, "AuthenticationFailed"));
    let fresh = blob_uri(&bench.container(), "x.json");
    assert_eq!(put(&fresh).status, 201);
    bench.standin.advance(25 * HOUR);
    assert_eq!(put(&fresh).error(), (403, "AuthenticationFailed"));
    assert!(bench.standin.violations().is_empty());
}

#[test]
fn a_queues_signature_is_good_for_posting_only() {
    let bench = bench();
    let queue = bench.queue();
    let (path, sas) = queue.split_once('?').unwrap();
    let answer = bench.get(&format!("{path}/messages?{sas}"));
    assert_eq!(answer.error(), (403, "AuthorizationPermissionMismatch"));
}

#[test]
fn rotation_hands_out_other_names() {
    let bench = bench();
    let (container, queue) = (bench.container(), bench.queue());
    let put = |uri: &str| bench.send(bench.put(uri, "x")).unwrap();
    bench.standin.rotate_resources(true);
    assert_ne!(
        container.split('?').next(),
        bench.container().split('?').next()
    );
    assert_eq!(put(&blob_uri(&container, "x")).status, 201);
    bench.standin.rotate_resources(false);
    assert_eq!(
        put(&blob_uri(&container, "x")).error(),
        (404, "ContainerNotFound")
    );
    assert_eq!(
        bench.send(bench.post(&queue, "eA==")).unwrap().error(),
        (404, "QueueNotFound")
    );
    assert_eq!(put(&blob_uri(&bench.container(), "x")).status, 201);
}

#[test]
fn blocks_become_a_blob_when_listed() {
    let bench = bench();
    let uri = blob_uri(&bench.container(), "blocks.json");
    let block = |id: &str, content: &'static str| {
        let id = id.replace('=', "%3D");
        bench
            .send(
                bench
                    .http
                    .put(format!("{uri}&comp=block&blockid={id}"))
                    .body(content),
            )
            .unwrap()
    };
    let commit = |list: &str| {
        let xml =
            format!("<?xml version=\"1.0\" encoding=\"utf-8\"?><BlockList>{list}</BlockList>");
        bench
            .send(bench.http.put(format!("{uri}&comp=blocklist")).body(xml))
            .unwrap()
    };
    assert_eq!(block("QUE=", "a").status, 201);
    assert_eq!(block("QUI=", "b").status, 201);
    assert_eq!(block("QUJD", "c").status, 201, "as long in base64");
    assert_eq!(block("QUJDRA==", "d").error(), (400, "InvalidBlobOrBlock"));
    assert_eq!(block("!", "d").error(), (400, "InvalidQueryParameterValue"));
    assert_eq!(
        bench.get(&uri).status,
        404,
        "nothing is visible before the commit"
    );
    assert_eq!(
        commit("<Latest>QkI=</Latest>").error(),
        (400, "InvalidBlockList")
    );
    assert_eq!(
        commit("<Latest>QUI=<Latest>").error(),
        (400, "InvalidXmlDocument")
    );
    assert_eq!(
        commit("<Latest>QUI=</Latest><Latest>QUE=</Latest>").status,
        201
    );
    assert_eq!(bench.get(&uri).body, b"ba");
}

#[test]
fn what_the_service_tolerates_is_told() {
    let bench = bench();
    let uri = blob_uri(&bench.container(), "x.json.gz");
    let request = bench
        .put(&uri, "x")
        .header("x-ms-blob-content-encoding", "gzip");
    assert_eq!(
        bench.send(request.bearer_auth("leaked")).unwrap().status,
        201
    );
    let violations = bench.standin.violations();
    assert_eq!(violations.len(), 2, "{violations:?}");
    let kind = bench.http.put(&uri).body("x");
    assert_eq!(
        bench.send(kind).unwrap().error(),
        (400, "MissingRequiredHeader")
    );
}

// --- queues -------------------------------------------------------------------------------

#[test]
fn a_message_is_xml_of_at_most_64_kib() {
    let bench = bench();
    bench.standin.pause_ingestion();
    let queue = bench.queue();
    let answer = bench.send(bench.post(&queue, "eA==")).unwrap();
    assert_eq!(answer.status, 201);
    for element in [
        "<QueueMessagesList><QueueMessage><MessageId>",
        "<PopReceipt>",
        "<TimeNextVisible>",
    ] {
        assert!(answer.text().contains(element), "{}", answer.text());
    }
    assert_eq!(
        bench
            .send(bench.post(&queue, &"A".repeat(65536)))
            .unwrap()
            .status,
        201
    );
    let large = bench.send(bench.post(&queue, &"A".repeat(65537))).unwrap();
    assert_eq!(large.error(), (413, "RequestBodyTooLarge"));
    let broken = bench.send(bench.post(&queue, "</MessageText>")).unwrap();
    assert_eq!(broken.error(), (400, "InvalidXmlDocument"));
    let ttl = bench
        .send(bench.post(&format!("{queue}&messagettl=0"), "eA=="))
        .unwrap();
    assert_eq!(ttl.error(), (400, "OutOfRangeQueryParameterValue"));
    let forever = bench
        .send(bench.post(&format!("{queue}&messagettl=-1"), "eA=="))
        .unwrap();
    assert_eq!(forever.status, 201);
}

#[test]
fn failures_are_reported_to_their_queue_which_is_read_and_deleted() {
    let bench = bench();
    let text = row(1);
    bench.ingest("x.json", text.as_bytes(), text.len(), |message| {
        message["TableName"] = json!("Nope")
    });
    let queue = bench.resources("FailedIngestionsQueue").swap_remove(0);
    let (path, sas) = queue.split_once('?').unwrap();
    let list = |more: &str| bench.get(&format!("{path}/messages?{more}{sas}")).text();
    let element = |xml: &str, name: &str| -> String {
        let after = xml
            .split_once(&format!("<{name}>"))
            .map_or("", |(_, after)| after);
        after.split('<').next().unwrap().into()
    };
    let peeked = list("peekonly=true&");
    assert!(!peeked.contains("<PopReceipt>"));
    let taken = list("visibilitytimeout=30&");
    let report: Value =
        serde_json::from_slice(&STANDARD.decode(element(&taken, "MessageText")).unwrap()).unwrap();
    assert_eq!(report["ErrorCode"], "BadRequest_TableNotExist");
    assert_eq!(report["FailureStatus"], "Permanent");
    assert!(!list("").contains("<QueueMessage>"), "hidden");
    bench.standin.advance(Duration::from_secs(31));
    let again = list("");
    assert_eq!(element(&again, "MessageId"), element(&taken, "MessageId"));
    let delete = |receipt: &str| {
        let id = element(&taken, "MessageId");
        bench
            .send(
                bench
                    .http
                    .delete(format!("{path}/messages/{id}?popreceipt={receipt}&{sas}")),
            )
            .unwrap()
    };
    assert_eq!(
        delete(&element(&taken, "PopReceipt")).error(),
        (400, "PopReceiptMismatch")
    );
    assert_eq!(delete(&element(&again, "PopReceipt")).status, 204);
    assert_eq!(
        delete(&element(&again, "PopReceipt")).error(),
        (404, "MessageNotFound")
    );
}

// --- ingestion ----------------------------------------------------------------------------

#[test]
fn rows_land_and_are_shown() {
    let bench = bench();
    let text: String = (0..3).map(row).collect();
    bench.ingest("x.json.gz", &gzip(text.as_bytes()), text.len(), |_| {});
    assert_eq!(bench.row_count(), 3);
    let rows = bench.standin.rows(DATABASE, TABLE);
    assert_eq!(rows[2], row(2).trim());
    let page = bench.get(&bench.uri("/rows?database=Telemetry&table=Events&n=1"));
    assert_eq!(page.text(), row(2));
    let state = bench.get(&bench.uri("/state")).json();
    assert_eq!(state["tables"][0]["rows"], 3);
    assert_eq!(state["tables"][0]["raw_size"], text.len());
    assert_eq!(bench.standin.violations(), Vec::<String>::new());
    assert_eq!(bench.failure_codes(), Vec::<String>::new());
    assert_eq!(bench.standin.messages().len(), 1);
}

#[test]
fn a_mapping_puts_the_whole_record_in_one_column() {
    let bench = bench();
    let text = "{\"a\":1.50}\n";
    let into_records = |message: &mut Value, mapping: Value| {
        message["TableName"] = json!("Records");
        message["AdditionalProperties"]["ingestionMappingReference"] = mapping;
        message["AdditionalProperties"]["ingestionMappingType"] = json!("Json");
    };
    bench.ingest("x.json", text.as_bytes(), text.len(), |message| {
        into_records(message, json!("record_v1"))
    });
    assert_eq!(
        bench.standin.rows(DATABASE, "Records"),
        ["{\"record\":{\"a\":1.50}}"]
    );
    assert!(bench.standin.drop_mapping(DATABASE, "Records", "record_v1"));
    bench.ingest("y.json", text.as_bytes(), text.len(), |message| {
        into_records(message, json!("record_v1"))
    });
    assert_eq!(
        bench.failure_codes(),
        ["BadRequest_MappingReferenceWasNotFound"]
    );
    assert_eq!(bench.standin.violations(), Vec::<String>::new());
}

#[test]
fn the_suffix_alone_decides_decompression() {
    let bench = bench();
    let text = row(1);
    bench.ingest("x.json", &gzip(text.as_bytes()), text.len(), |_| {});
    bench.ingest("y.json.gz", text.as_bytes(), text.len(), |_| {});
    assert_eq!(
        bench.failure_codes(),
        [
            "BadRequest_NoRecordsOrWrongFormat",
            "BadRequest_InvalidBlob"
        ]
    );
    assert_eq!(bench.row_count(), 0);
}

#[test]
fn json_loses_the_bad_line_and_multijson_the_whole_blob() {
    let bench = bench();
    let text = format!("{}{{\"tag\":\n{}", row(1), row(2));
    bench.ingest("x.json", text.as_bytes(), text.len(), |_| {});
    assert_eq!(
        (
            bench.row_count(),
            bench.standin.counts(DATABASE, TABLE).lines_skipped
        ),
        (2, 1)
    );
    let multi =
        |message: &mut Value| message["AdditionalProperties"]["format"] = json!("multijson");
    bench.ingest("y.json", text.as_bytes(), text.len(), multi);
    assert_eq!(
        (bench.row_count(), bench.failure_codes()),
        (2, vec!["BadRequest_InvalidBlob".to_owned()])
    );
    let array = "[{\"tag\":\n\"pretty\"},{\"tag\":\"b\"}]";
    bench.ingest("z.json", array.as_bytes(), array.len(), multi);
    assert_eq!(bench.row_count(), 4);
}

#[test]
fn a_dynamic_above_a_mebibyte_is_null_and_the_row_stays() {
    let bench = bench();
    let text = format!(
        "{{\"tag\":\"large\",\"log\":\"{}\"}}\n",
        "x".repeat(1 << 20)
    );
    bench.ingest("x.json.gz", &gzip(text.as_bytes()), text.len(), |_| {});
    let rows = bench.standin.rows(DATABASE, TABLE);
    assert_eq!(
        rows,
        ["{\"timestamp\":null,\"tag\":\"large\",\"log\":null}"]
    );
    assert_eq!(bench.standin.counts(DATABASE, TABLE).values_nulled, 1);
}

#[test]
fn a_wrong_raw_size_is_told() {
    let bench = bench();
    let (text, zipped) = (row(1), gzip(row(1).as_bytes()));
    bench.ingest("x.json.gz", &zipped, zipped.len(), |_| {});
    let violations = bench.standin.violations();
    assert_eq!(violations.len(), 1, "{violations:?}");
    assert!(
        violations[0].contains(&format!("inflates to {} bytes", text.len())),
        "{violations:?}"
    );
    assert_eq!(bench.row_count(), 1, "the service only batches worse");
}

#[test]
fn what_is_missing_fails_for_good() {
    let bench = bench();
    let text = row(1);
    let ingest =
        |change: &dyn Fn(&mut Value)| bench.ingest("x.json", text.as_bytes(), text.len(), change);
    ingest(&|message| message["DatabaseName"] = json!("Nope"));
    ingest(&|message| message["TableName"] = json!("events"));
    ingest(&|message| message["AdditionalProperties"]["authorizationContext"] = json!("made up"));
    ingest(&|message| {
        message["BlobPath"] = json!(
            message["BlobPath"]
                .as_str()
                .unwrap()
                .replace("x.json", "y.json")
        )
    });
    ingest(&|message| {
        message["BlobPath"] = json!(
            message["BlobPath"]
                .as_str()
                .unwrap()
                .replace("sig=", "sig=A")
        )
    });
    ingest(&|message| message["AdditionalProperties"]["format"] = json!("avro"));
    bench.ingest("empty.json", b"", 1, |_| {});
    bench.standin.pause_ingestion();
    bench.enqueue(&bench.message(&bench.upload("z.json", text.as_bytes()), text.len()));
    bench.standin.set_roles(&["Viewer"]);
    bench.standin.resume_ingestion();
    bench.settle();
    assert_eq!(
        bench.failure_codes(),
        [
            "BadRequest_DatabaseNotExist",
            "BadRequest_TableNotExist",
            "BadRequest_InvalidKustoIdentityToken",
            "Download_SourceNotFound",
            "Download_Forbidden",
            "BadRequest_FormatNotSupported",
            "BadRequest_EmptyBlob",
            "BadRequest_TableAccessDenied",
        ]
    );
}

#[test]
fn an_expired_identity_token_is_found_out() {
    let bench = bench();
    let text = row(1);
    bench.ingest("x.json", text.as_bytes(), text.len(), |_| {
        bench.standin.expire_identity_tokens()
    });
    assert_eq!(
        bench.failure_codes(),
        ["BadRequest_InvalidKustoIdentityToken"]
    );
    let pages = ["/failures", "/messages"].map(|page| bench.get(&bench.uri(page)).json());
    assert_eq!(
        pages[0]["ErrorCode"],
        "BadRequest_InvalidKustoIdentityToken"
    );
    assert_eq!(pages[0]["IngestionSourceId"], pages[1]["Id"]);
    let failure = &bench.standin.failures()[0];
    assert!(!failure.source_path.contains('?'), "{failure:?}");
    assert_eq!(failure.failure_kind, "Permanent");
}

#[test]
fn a_corrupt_message_is_refused_and_told() {
    let bench = bench();
    for text in [
        "not base64!",
        "eyJJZCI6",
        &STANDARD.encode("{}\0"),
        &STANDARD.encode("{}"),
    ] {
        assert_eq!(
            bench.send(bench.post(&bench.queue(), text)).unwrap().status,
            201
        );
    }
    bench.settle();
    assert_eq!(bench.failure_codes(), ["BadRequest_CorruptedMessage"; 4]);
    assert!(bench.standin.violations().len() >= 4);
}

#[test]
fn ingest_by_is_once_and_without_it_twice() {
    let bench = bench();
    let text = row(1);
    let tagged = |message: &mut Value| {
        message["AdditionalProperties"]["tags"] = json!("[\"ingest-by:v1\"]");
        message["AdditionalProperties"]["ingestIfNotExists"] = json!("[\"v1\"]");
    };
    for name in ["a.json", "b.json"] {
        bench.ingest(name, text.as_bytes(), text.len(), tagged);
    }
    assert_eq!(bench.row_count(), 1);
    assert_eq!(bench.standin.counts(DATABASE, TABLE).skipped_by_tag, 1);
    for _ in 0..2 {
        bench.ingest("c.json", text.as_bytes(), text.len(), |_| {});
    }
    assert_eq!(bench.row_count(), 3, "across batches a blob counts twice");
    assert_eq!(bench.standin.violations(), Vec::<String>::new());
}

#[test]
fn a_blob_twice_in_a_batch_counts_once() {
    let bench = Bench::start(StandinOptions {
        batching: Batching::Manual,
        ..StandinOptions::default()
    });
    let text = row(1);
    let message = bench.message(&bench.upload("x.json", text.as_bytes()), text.len());
    bench.enqueue(&message);
    bench.enqueue(&message);
    assert!(
        bench
            .standin
            .wait_for(PATIENCE, |standin| standin.messages().len() == 2)
    );
    assert_eq!(bench.row_count(), 0, "the batch is open");
    bench.standin.seal_batches();
    bench.settle();
    assert_eq!(bench.row_count(), 1);
    assert_eq!(
        bench.failure_codes(),
        ["BlobAlreadyReceived_BlobAlreadyFoundInBatch"]
    );
}

#[test]
fn a_blob_that_flushes_shares_its_batch_with_none() {
    let bench = Bench::start(StandinOptions {
        batching: Batching::Manual,
        ..StandinOptions::default()
    });
    let text = row(1);
    let blob_path = bench.upload("x.json", text.as_bytes());
    bench.enqueue(&bench.message(&blob_path, text.len()));
    let mut flushing = bench.message(&blob_path, text.len());
    flushing["FlushImmediately"] = json!(true);
    bench.enqueue(&flushing);
    assert!(bench.standin.wait_for(PATIENCE, |_| bench.row_count() == 1));
    bench.standin.seal_batches();
    bench.settle();
    assert_eq!(bench.row_count(), 2);
}

#[test]
fn a_batch_is_sealed_by_age_and_by_count() {
    let bench = Bench::start(StandinOptions {
        batching: Batching::Policy {
            blob_count_max: 2,
            raw_size_max: 1 << 30,
            age_max: HOUR,
        },
        ..StandinOptions::default()
    });
    let text = row(1);
    let enqueue = |name: &str| {
        bench.enqueue(&bench.message(&bench.upload(name, text.as_bytes()), text.len()))
    };
    enqueue("a.json");
    assert!(
        bench
            .standin
            .wait_for(PATIENCE, |standin| standin.messages().len() == 1)
    );
    assert_eq!(bench.row_count(), 0);
    bench.standin.advance(HOUR);
    bench.settle();
    assert_eq!(bench.row_count(), 1);
    enqueue("b.json");
    enqueue("c.json");
    bench.settle();
    assert_eq!(bench.row_count(), 3);
}

#[test]
fn a_blob_that_is_not_retained_is_gone() {
    let bench = bench();
    let text = row(1);
    bench.ingest("kept.json", text.as_bytes(), text.len(), |_| {});
    bench.ingest("gone.json", text.as_bytes(), text.len(), |message| {
        message["RetainBlobOnSuccess"] = json!(false)
    });
    let status = |name: &str| bench.get(&blob_uri(&bench.container(), name)).status;
    assert_eq!((status("kept.json"), status("gone.json")), (200, 404));
}

#[test]
fn members_beyond_the_first_are_lost_where_so_configured() {
    let bench = Bench::start(StandinOptions {
        members: Members::First,
        ..StandinOptions::default()
    });
    let bytes = [gzip(row(1).as_bytes()), gzip(row(2).as_bytes())].concat();
    bench.ingest("x.json.gz", &bytes, 2 * row(1).len(), |_| {});
    assert_eq!(bench.row_count(), 1);
    assert_eq!(bench.standin.violations().len(), 1, "the raw size tells it");
}

#[test]
fn rows_are_bounded_and_totals_are_not() {
    let bench = Bench::start(StandinOptions {
        rows_count_max: 2,
        ..StandinOptions::default()
    });
    for first in [0, 5] {
        let text: String = (first..first + 5).map(row).collect();
        bench.ingest(
            &format!("{first}.json"),
            text.as_bytes(),
            text.len(),
            |_| {},
        );
    }
    assert_eq!(bench.row_count(), 10);
    let rows = bench.standin.rows(DATABASE, TABLE);
    assert_eq!(rows, [row(8).trim(), row(9).trim()]);
}

#[test]
fn a_dropped_table_fails_until_it_is_created() {
    let bench = bench();
    let text = row(1);
    assert!(bench.standin.drop_table(DATABASE, TABLE));
    bench.ingest("a.json", text.as_bytes(), text.len(), |_| {});
    assert_eq!(bench.failure_codes(), ["BadRequest_TableNotExist"]);
    bench
        .standin
        .create_table(&TableOptions::fluent_bit(DATABASE, TABLE))
        .unwrap();
    bench.ingest("b.json", text.as_bytes(), text.len(), |_| {});
    assert_eq!(bench.row_count(), 1);
}

// --- faults -------------------------------------------------------------------------------

#[test]
fn a_status_comes_in_the_words_of_its_service() {
    let bench = bench();
    let busy = |code, error_code| Action::Status {
        code,
        error_code,
        retry_after: Some(7),
    };
    let uri = blob_uri(&bench.container(), "x");
    bench
        .standin
        .script(fault(Target::BlobPut, 2, busy(503, "ServerBusy")));
    for _ in 0..2 {
        let answer = bench.send(bench.put(&uri, "x")).unwrap();
        assert_eq!(answer.error(), (503, "ServerBusy"));
        assert_eq!(answer.header("retry-after"), "7");
        assert!(answer.text().contains("<Code>ServerBusy</Code>"));
    }
    assert_eq!(bench.send(bench.put(&uri, "x")).unwrap().status, 201);

    bench.standin.script(fault(
        Target::Token,
        1,
        busy(429, "temporarily_unavailable"),
    ));
    assert_eq!(
        bench.token_answer(&[]).json()["error"],
        "temporarily_unavailable"
    );

    let token = bench.token();
    bench
        .standin
        .script(fault(Target::Resources, 1, busy(429, "Throttling")));
    assert_eq!(
        bench.command_with(&token, ".show version").status,
        200,
        "another command"
    );
    let throttled = bench.command_with(&token, ".get ingestion resources");
    assert_eq!(throttled.status, 429);
    assert_eq!(throttled.json()["error"]["@permanent"], false);
}

#[test]
fn a_fault_can_be_for_one_account() {
    let bench = bench();
    let containers = bench.resources("TempStorage");
    let action = Action::Status {
        code: 500,
        error_code: "InternalError",
        retry_after: None,
    };
    bench.standin.script(Fault {
        account: Some(1),
        ..fault(Target::BlobPut, usize::MAX, action)
    });
    let put = |container: &str| {
        bench
            .send(bench.put(&blob_uri(container, "x"), "x"))
            .unwrap()
            .status
    };
    let statuses: Vec<u16> = containers.iter().map(|container| put(container)).collect();
    assert_eq!(statuses, [201, 201, 500, 500]);
    bench.standin.clear_faults();
    assert_eq!(put(&containers[3]), 201);
}

#[test]
fn a_timeout_is_before_or_after_the_act() {
    let bench = bench();
    for (action, stored) in [
        (Action::TimeoutBeforeAccept, false),
        (Action::TimeoutAfterAccept, true),
    ] {
        let uri = blob_uri(&bench.container(), &format!("{stored}"));
        bench.standin.script(fault(Target::BlobPut, 1, action));
        let request = bench.put(&uri, "x");
        let request = bench.runtime.spawn(async move { request.send().await });
        let seen = || {
            bench
                .standin
                .requests()
                .iter()
                .filter(|seen| seen.target == Target::BlobPut)
                .count()
        };
        assert!(
            bench
                .standin
                .wait_for(PATIENCE, |_| seen() == usize::from(stored) + 1)
        );
        if stored {
            let landed = || bench.get(&uri).status == 200;
            assert!(bench.standin.wait_for(PATIENCE, |_| landed()));
        } else {
            assert_eq!(bench.get(&uri).status, 404);
        }
        assert!(!request.is_finished());
        request.abort();
    }
    let unanswered = bench
        .standin
        .requests()
        .into_iter()
        .filter(|seen| seen.status == 0);
    assert_eq!(unanswered.count(), 2);
}

#[test]
fn a_reset_is_within_the_body_or_after_the_act() {
    let bench = bench();
    for (action, stored) in [
        (Action::ResetMidBody, false),
        (Action::ResetAfterAccept, true),
    ] {
        let uri = blob_uri(&bench.container(), &format!("{stored}"));
        bench.standin.script(fault(Target::BlobPut, 1, action));
        assert!(bench.send(bench.put(&uri, vec![0; 8 << 20])).is_err());
        assert_eq!(bench.get(&uri).status == 200, stored);
    }
}

#[test]
fn a_delay_only_delays() {
    let bench = bench();
    bench.standin.script(fault(
        Target::Metadata,
        1,
        Action::Delay(Duration::from_millis(1)),
    ));
    assert_eq!(bench.get(&bench.uri("/v1/rest/auth/metadata")).status, 200);
}

#[test]
fn one_account_dies_and_comes_back() {
    let bench = bench();
    let containers = bench.resources("TempStorage");
    let put = |container: &str| bench.send(bench.put(&blob_uri(container, "x"), "x"));
    assert!(put(&containers[0]).is_ok(), "a connection is kept alive");
    bench.standin.kill_account(0);
    assert!(put(&containers[0]).is_err());
    assert!(is_refused(&containers[0]));
    assert_eq!(put(&containers[2]).unwrap().status, 201);
    bench.standin.revive_account(0).unwrap();
    assert_eq!(put(&containers[0]).unwrap().status, 201);
}

#[test]
fn it_goes_away_and_comes_back_under_the_same_ports() {
    let bench = bench();
    let (container, text) = (bench.container(), row(1));
    let message = bench.message(&bench.upload("x.json", text.as_bytes()), text.len());
    for _ in 0..3 {
        bench.standin.stop_listening();
        let metadata = bench.uri("/v1/rest/auth/metadata");
        assert!(bench.send(bench.http.get(&metadata)).is_err());
        assert!(
            bench
                .send(bench.put(&blob_uri(&container, "y"), "x"))
                .is_err()
        );
        assert!(is_refused(&metadata) && is_refused(&container));
        bench.standin.resume().unwrap();
        assert_eq!(bench.get(&metadata).status, 200);
    }
    bench.enqueue(&message);
    bench.settle();
    assert_eq!(bench.row_count(), 1, "what was stored stayed");
}

#[test]
fn secrets_and_requests_are_noted() {
    let bench = bench();
    let token = bench.token();
    let identity_token = bench.identity_token();
    let container = bench.container();
    bench.upload("x.json", b"x");
    let secrets = bench.standin.secrets();
    let signature = container.split_once("sig=").unwrap().1.to_owned();
    for secret in [
        token,
        identity_token,
        signature,
        bench.standin.options().client_secret.clone(),
    ] {
        assert!(secrets.contains(&secret), "{secret}");
    }
    let requests = bench.standin.requests();
    let put = requests
        .iter()
        .find(|seen| seen.target == Target::BlobPut)
        .unwrap();
    assert_eq!(
        (put.method.as_str(), put.account, put.status),
        ("PUT", Some(0), 201)
    );
    assert!(
        put.headers
            .contains(&("x-ms-blob-type".into(), "BlockBlob".into()))
    );
}
