//! The official Python client and the stand-in understand each other: it ingests, the rows land, nothing is a violation.
//!
//! The queue messages that it posts are the measure for weir's own, field by field.

#[path = "support/mod.rs"]
mod node;
#[path = "support/standin.rs"]
mod support;

use std::collections::BTreeSet;
use std::io::Write;
use std::process::{Command, Stdio};

use node::{Weir, free_address};
use serde_json::{Value, json};
use support::{Bench, DATABASE, row, weir_config};
use weir::standin::{StandinOptions, Target};

/// Longer than what some clients cut off.
const SAS_SIZE: usize = 300;

/// Runs the client; gives its output, and the stand-in that it talked to.
fn ingest(rows: &[String]) -> (Value, Bench) {
    let python = std::env::var("WEIR_TEST_PYTHON")
        .expect("WEIR_TEST_PYTHON is what tests/python/venv.sh prints");
    let bench = Bench::start(StandinOptions {
        account_count: 3,
        sas_size: SAS_SIZE,
        ..StandinOptions::default()
    });
    let options = bench.standin.options();
    let config = json!({
        "uri": bench.standin.ingest_uri(),
        "authority": bench.standin.token_authority(),
        "tenant": options.tenant,
        "client_id": options.client_id,
        "client_secret": options.client_secret,
        "database": DATABASE,
        "rows": rows,
    });
    let mut client = Command::new(python)
        .arg(concat!(
            env!("CARGO_MANIFEST_DIR"),
            "/tests/python/ingest.py"
        ))
        .env("NO_PROXY", "127.0.0.1")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    client
        .stdin
        .take()
        .unwrap()
        .write_all(config.to_string().as_bytes())
        .unwrap();
    let output = client.wait_with_output().unwrap();
    assert!(
        output.status.success(),
        "the client failed; its words are above"
    );
    bench.settle();
    (serde_json::from_slice(&output.stdout).unwrap(), bench)
}

#[test]
#[ignore = "needs Python packages: set WEIR_TEST_PYTHON to what tests/python/venv.sh DIRECTORY prints"]
fn the_official_client_ingests() {
    let rows: Vec<String> = (0..1000)
        .map(|number| row(number).trim().to_owned())
        .collect();
    let (sources, bench) = ingest(&rows);
    let standin = &bench.standin;
    assert_eq!(standin.violations(), Vec::<String>::new());
    assert_eq!(bench.failure_codes(), Vec::<String>::new());
    assert_eq!(standin.rows(DATABASE, "Events"), rows);
    let records = rows.iter().map(|row| format!("{{\"record\":{row}}}"));
    assert_eq!(
        standin.rows(DATABASE, "Records"),
        records.collect::<Vec<_>>()
    );

    let raw_size: usize = rows.iter().map(|row| row.len() + 1).sum();
    let messages = standin.messages();
    let message = |table: &str| -> Value {
        let mut messages = messages
            .iter()
            .map(|json| serde_json::from_str::<Value>(json).unwrap());
        let message = messages
            .find(|message| message["TableName"] == table)
            .unwrap();
        println!("{message:#}");
        assert_eq!(message["Id"], sources[table]);
        assert_eq!(message["RetainBlobOnSuccess"], true);
        assert_eq!(message["AdditionalProperties"]["format"], "json");
        let sas = message["BlobPath"]
            .as_str()
            .unwrap()
            .split('?')
            .nth(1)
            .unwrap();
        assert!(sas.len() >= SAS_SIZE);
        message
    };
    // It does not know the size of a stream.
    assert_eq!(message("Events")["RawDataSize"], Value::Null);
    let records = message("Records");
    assert_eq!(records["RawDataSize"], raw_size);
    assert_eq!(
        records["AdditionalProperties"]["tags"],
        "[\"ingest-by:rows\"]"
    );
    assert_eq!(
        records["AdditionalProperties"]["ingestionMappingType"],
        "Json"
    );
    let puts = standin
        .requests()
        .into_iter()
        .filter(|seen| seen.target == Target::BlobPut);
    let puts: Vec<_> = puts
        .map(|seen| (seen.status, seen.path.ends_with(".gz")))
        .collect();
    assert_eq!(puts, [(201, true), (201, true)]);
}

/// A field that weir's messages have otherwise than those of the official client, and why.
const DIFFERENCES: [(&str, &str); 10] = [
    ("Id", "each source has its own"),
    ("BlobPath", "each blob has its own name and place"),
    (
        "RawDataSize",
        "weir knows it, the client does not know that of a stream",
    ),
    (
        "SourceMessageCreationTime",
        "weir says when the first row came, in UTC by its Z; the client when it makes the message",
    ),
    ("ApplicationForTracing", "each names itself"),
    ("ClientVersionForTracing", "each names itself"),
    (
        "ReportLevel",
        "weir asks for none: nobody would read the report; this run of the client asks for all",
    ),
    (
        "AdditionalProperties.tags",
        "weir's tag is the name of the blob",
    ),
    (
        "AdditionalProperties.ingestIfNotExists",
        "weir's tag is the name of the blob",
    ),
    (
        "AdditionalProperties.authorizationContext",
        "each fetches an identity token of its own",
    ),
];

/// The fields of a message, those of the nested object too.
fn fields(message: &Value) -> Vec<(String, Value)> {
    let object = message.as_object().unwrap();
    let flat = object
        .iter()
        .flat_map(|(name, value)| match value.as_object() {
            Some(nested) => nested
                .iter()
                .map(|(inner, value)| (format!("{name}.{inner}"), value.clone()))
                .collect(),
            None => vec![(name.clone(), value.clone())],
        });
    flat.collect()
}

#[test]
#[ignore = "needs Python packages: set WEIR_TEST_PYTHON to what tests/python/venv.sh DIRECTORY prints"]
fn weir_says_what_the_official_client_says() {
    let rows: Vec<String> = (0..10)
        .map(|number| row(number).trim().to_owned())
        .collect();
    let (_, bench) = ingest(&rows);
    let standin = &bench.standin;
    let official = standin.messages();
    let directory = tempfile::tempdir().unwrap();
    let admin = free_address();
    let routes = "[[route]]\npath = \"/events\"\nenvelope = \"none\"\n\
                  [[route]]\npath = \"/records\"\nenvelope = \"none\"\ntable = \"Records\"\nmapping = \"record_v1\"\n\
                  dedup = \"ingest-by\"\n";
    let config = weir_config(standin, directory.path(), admin, routes);
    let weir = Weir::start_logging(directory, &config, admin, "info");
    for path in ["/events", "/records"] {
        let reply = weir.connect().post(path, rows.join("\n").as_bytes());
        assert_eq!(reply.json()["accepted"], 10);
    }
    weir.wait_for_metric("weir_delivered_rows_total 20");
    bench.settle();
    // Both have brought the same rows, in the same order.
    for table in ["Events", "Records"] {
        let landed = standin.rows(DATABASE, table);
        assert_eq!(landed.len(), 20, "{:?}", standin.failures());
        assert_eq!(landed[..10], landed[10..]);
    }
    assert_eq!(standin.violations(), Vec::<String>::new());

    let all = standin.messages();
    let (official, ours) = (&all[..official.len()], &all[official.len()..]);
    let of = |messages: &[String], table: &str| {
        let mut parsed = messages
            .iter()
            .map(|json| serde_json::from_str::<Value>(json).unwrap());
        let found = parsed.find(|message| message["TableName"] == table);
        fields(&found.unwrap())
    };
    let mut found = BTreeSet::new();
    for table in ["Events", "Records"] {
        let (official, ours) = (of(official, table), of(ours, table));
        for (name, value) in &official {
            let same = ours
                .iter()
                .any(|(other, ours)| other == name && ours == value);
            if !same {
                found.insert(name.clone());
            }
        }
        for (name, value) in &ours {
            if !official
                .iter()
                .any(|(other, theirs)| other == name && theirs == value)
            {
                found.insert(name.clone());
            }
        }
    }
    let excused: BTreeSet<String> = DIFFERENCES.iter().map(|(name, _)| (*name).into()).collect();
    assert_eq!(
        found, excused,
        "the differences, and those that have a reason; {all:#?}"
    );
}
