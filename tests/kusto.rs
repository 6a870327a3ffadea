//! weir as a process delivers to the stand-in: what was acknowledged lands, whatever goes wrong on the way.

mod support;
#[path = "support/standin.rs"]
mod remote;

use std::collections::BTreeSet;
use std::process::Command;
use std::time::{Duration, Instant};

use remote::{Bench, DATABASE, weir_config};
use serde_json::Value;
use support::{Weir, free_address};
use weir::standin::{Action, Fault, Standin, StandinOptions, TableOptions, Target};

/// Longer than the timeouts of one blob and one message together.
const PATIENCE: Duration = Duration::from_secs(300);

/// Two tables with both envelopes, one of them with mapping and tags.
const ROUTES: &str = "[[route]]\npath = \"/*\"\n\
    [[route]]\npath = \"/mapped\"\nmapping = \"fluent_bit_v1\"\n\
    [[route]]\npath = \"/records\"\ntable = \"Records\"\nenvelope = \"none\"\nmapping = \"record_v1\"\ndedup = \"ingest-by\"\n\
    [[route]]\npath = \"/delivered\"\ntable = \"Delivered\"\nack = \"delivered\"\n";

/// A weir, the stand-in that it delivers to, and what it has acknowledged of the table `Events`.
struct Pair {
    bench: Bench,
    weir: Option<Weir>,
    config: String,
    acknowledged: BTreeSet<u64>,
}

fn options() -> StandinOptions {
    let mut options = StandinOptions::default();
    let delivered = TableOptions::fluent_bit(DATABASE, "Delivered");
    options.tables.push(delivered);
    options
}

impl Pair {
    fn start(options: StandinOptions, more: &str) -> Pair {
        Self::start_beside(Bench::start(options), more, "info")
    }

    fn start_beside(bench: Bench, more: &str, level: &str) -> Pair {
        let directory = tempfile::tempdir().unwrap();
        let admin = free_address();
        let more = format!("{more}{ROUTES}");
        let config = weir_config(&bench.standin, directory.path(), admin, &more);
        let weir = Weir::start_logging(directory, &config, admin, level);
        Pair {
            bench,
            weir: Some(weir),
            config,
            acknowledged: BTreeSet::new(),
        }
    }

    fn weir(&self) -> &Weir {
        self.weir.as_ref().unwrap()
    }

    fn standin(&self) -> &Standin {
        &self.bench.standin
    }

    /// Sends records, each in a request of its own, with `pad` bytes that hardly compress; all are acknowledged.
    fn send(&mut self, count: u64, pad: usize) {
        let mut noise = support::noise();
        let mut client = self.weir().connect();
        let begin = self.acknowledged.len() as u64;
        for n in begin..begin + count {
            let pad: String = noise
                .by_ref()
                .take(pad / 16)
                .map(|number| format!("{number:016x}"))
                .collect();
            let reply = client.post("/x", format!("{{\"n\":{n},\"pad\":\"{pad}\"}}").as_bytes());
            assert_eq!(reply.status, 201, "{reply:?}");
            self.acknowledged.insert(n);
        }
    }

    fn landed(standin: &Standin) -> BTreeSet<u64> {
        let rows = standin.rows(DATABASE, "Events").into_iter();
        rows.map(|row| {
            let row: Value = serde_json::from_str(&row).unwrap();
            row["log"]["n"].as_u64().unwrap()
        })
        .collect()
    }

    /// Waits until every acknowledged record has landed, and all books balance.
    fn assert_all_landed(&self) {
        let wanted = self.acknowledged.len() as u64;
        let landed = self.standin().wait_for(PATIENCE, |standin| {
            standin.row_count(DATABASE, "Events") >= wanted
                && Self::landed(standin).len() as u64 == wanted
        });
        assert!(
            landed,
            "{:?} of {wanted} landed; failures {:?}\n{}",
            Self::landed(self.standin()).len(),
            self.standin().failures(),
            self.weir().log()
        );
        assert_eq!(Self::landed(self.standin()), self.acknowledged);
        self.weir().wait_for_metric("weir_rows_in_spool 0");
        self.weir().assert_accounts_balance();
        assert_eq!(self.standin().violations(), Vec::<String>::new());
    }

    fn kill_and_start(&mut self) {
        let weir = self.weir.take().unwrap();
        let admin = weir.admin;
        self.weir = Some(Weir::start_logging(
            weir.kill(),
            &self.config,
            admin,
            "info",
        ));
    }

    /// `weir dead-letter` with the configuration: exit code, and what it printed.
    fn dead_letter(directory: &std::path::Path, arguments: &[&str]) -> (Option<i32>, String) {
        let output = Command::new(env!("CARGO_BIN_EXE_weir"))
            .arg("dead-letter")
            .args(arguments)
            .arg("--config")
            .arg(directory.join("weir.toml"))
            .output()
            .unwrap();
        let said = [output.stdout, output.stderr].concat();
        (output.status.code(), String::from_utf8(said).unwrap())
    }
}

fn fault(target: Target, times: usize, action: Action) -> Fault {
    Fault {
        target,
        account: None,
        times,
        action,
    }
}

fn status(code: u16, error_code: &'static str, retry_after: Option<u32>) -> Action {
    Action::Status {
        code,
        error_code,
        retry_after,
    }
}

#[test]
fn both_envelopes_land_with_mapping_and_tags() {
    let mut pair = Pair::start(options(), "");
    pair.send(3, 16);
    let mut client = pair.weir().connect();
    let mapped = client.post("/mapped", b"{\"n\":3,\"pad\":\"\"}");
    assert_eq!(mapped.status, 201);
    pair.acknowledged.insert(3);
    assert_eq!(
        client.post("/records", b"[{\"a\":1},{\"a\":2}]").status,
        201
    );
    pair.assert_all_landed();
    let standin = pair.standin();
    assert!(
        standin.wait_for(PATIENCE, |standin| standin.row_count(DATABASE, "Records")
            == 2)
    );
    assert_eq!(
        standin.rows(DATABASE, "Records"),
        ["{\"record\":{\"a\":1}}", "{\"record\":{\"a\":2}}"]
    );
    pair.bench.settle();
    let messages: Vec<Value> = standin
        .messages()
        .iter()
        .map(|json| serde_json::from_str(json).unwrap())
        .collect();
    let of = |table: &str, mapping: Value| {
        let found = messages.iter().find(|message| {
            message["TableName"] == table
                && message["AdditionalProperties"]["ingestionMappingReference"] == mapping
        });
        found.unwrap_or_else(|| panic!("no message of {table} {mapping} in {messages:#?}"))
    };
    let plain = &of("Events", Value::Null)["AdditionalProperties"];
    assert_eq!(
        (&plain["tags"], &plain["ingestionMappingType"]),
        (&Value::Null, &Value::Null)
    );
    of("Events", "fluent_bit_v1".into());
    let records = of("Records", "record_v1".into());
    let tag = records["AdditionalProperties"]["ingestIfNotExists"]
        .as_str()
        .unwrap();
    let tag: Vec<String> = serde_json::from_str(tag).unwrap();
    assert!(records["BlobPath"].as_str().unwrap().contains(&tag[0]));
    let puts = standin.requests().into_iter();
    for put in puts.filter(|seen| seen.target == Target::BlobPut) {
        assert_eq!(put.status, 201);
        assert!(put.path.ends_with(".json.gz"), "{}", put.path);
        let condition = put.headers.iter().find(|(name, _)| name == "if-none-match");
        assert_eq!(condition.unwrap().1, "*");
    }
    let (weir, address) = (pair.weir.take().unwrap(), pair.bench.standin.ingest_uri());
    let stopped = weir.stop();
    assert!(
        !stopped.stderr.contains(&options().client_secret),
        "{address}"
    );
}

#[test]
fn refusals_and_resets_lose_nothing() {
    let mut pair = Pair::start(options(), "");
    // More than one attempt has places to try.
    let times = 4;
    for target in [Target::BlobPut, Target::QueuePost] {
        for action in [
            status(429, "TooManyRequests", None),
            status(429, "TooManyRequests", Some(1)),
            status(503, "ServerBusy", None),
            status(503, "ServerBusy", Some(1)),
            status(500, "InternalError", None),
            Action::ResetMidBody,
            Action::ResetAfterAccept,
        ] {
            println!("{target:?} {action:?}");
            let failed = pair.weir().metric("weir_delivery_failures_total");
            pair.standin().script(fault(target, times, action));
            pair.send(20, 64);
            pair.assert_all_landed();
            pair.standin().clear_faults();
            let more = pair.weir().metric("weir_delivery_failures_total") - failed;
            assert!(more > 0, "the fault struck nothing");
        }
    }
}

#[test]
fn a_timeout_before_the_service_accepted_loses_nothing() {
    timeouts(Action::TimeoutBeforeAccept);
}

#[test]
fn a_timeout_after_the_service_accepted_loses_nothing() {
    timeouts(Action::TimeoutAfterAccept);
}

fn timeouts(action: Action) {
    let mut pair = Pair::start(options(), "");
    for target in [Target::BlobPut, Target::QueuePost] {
        pair.standin().script(fault(target, 1, action.clone()));
    }
    pair.send(20, 64);
    pair.assert_all_landed();
    let ids: Vec<String> = pair.standin().messages();
    let ids = ids.iter().map(|json| {
        let message: Value = serde_json::from_str(json).unwrap();
        let path = message["BlobPath"].as_str().unwrap();
        (
            message["Id"].to_string(),
            path.split('?').next().unwrap().to_owned(),
        )
    });
    let ids: Vec<(String, String)> = ids.collect();
    // A message that was repeated says the same.
    for (id, path) in &ids {
        for (other_id, other_path) in &ids {
            assert_eq!(id == other_id, path == other_path, "{ids:?}");
        }
    }
}

#[test]
fn what_ends_or_moves_in_mid_run_is_fetched_anew() {
    let mut pair = Pair::start(options(), "");
    pair.send(5, 64);
    pair.assert_all_landed();
    pair.standin().expire_sas();
    pair.send(5, 64);
    pair.assert_all_landed();
    pair.standin().expire_tokens();
    pair.standin().expire_sas();
    pair.send(5, 64);
    pair.assert_all_landed();
    // While a blob is on its way to where it will not be wanted any more.
    pair.standin().script(fault(
        Target::BlobPut,
        1,
        Action::Delay(Duration::from_secs(1)),
    ));
    pair.send(1, 64);
    assert!(pair.standin().wait_for(PATIENCE, |standin| {
        let requests = standin.requests();
        requests
            .last()
            .is_some_and(|seen| seen.target == Target::BlobPut && seen.status == 0)
    }));
    pair.standin().rotate_resources(false);
    pair.send(5, 64);
    pair.assert_all_landed();
    assert!(pair.weir().metric("weir_kusto_refreshes_total") >= 4);
}

#[test]
fn one_dead_account_of_six_is_passed_by() {
    let mut pair = Pair::start(
        StandinOptions {
            account_count: 6,
            ..options()
        },
        "",
    );
    pair.send(1, 64);
    pair.assert_all_landed();
    pair.standin().kill_account(2);
    for _ in 0..20 {
        pair.send(3, 64);
        pair.assert_all_landed();
    }
    let taken = pair.weir().metric("weir_kusto_put_failures_total")
        + pair.weir().metric("weir_kusto_post_failures_total");
    assert!(taken > 0, "the dead account was never tried");
    // Where one does not take it another does, within the same attempt.
    assert_eq!(pair.weir().metric("weir_delivery_failures_total"), 0);
}

#[test]
fn a_node_starts_and_takes_rows_while_the_service_is_away() {
    let bench = Bench::start(options());
    bench.standin.stop_listening();
    let mut pair = Pair::start_beside(bench, "", "info");
    pair.send(20, 64);
    let delayed = Action::Delay(Duration::from_secs(2));
    pair.standin().script(fault(
        Target::Resources,
        2,
        status(503, "ServiceUnavailable", None),
    ));
    pair.standin().script(fault(Target::Resources, 1, delayed));
    pair.standin().resume().unwrap();
    pair.assert_all_landed();
    assert!(pair.weir().metric("weir_kusto_refresh_failures_total") >= 3);
}

#[test]
fn an_outage_longer_than_memory_lasts_is_bridged_by_the_spool() {
    let mut pair = Pair::start(
        options(),
        "[upload]\nbuffer_count = 2\nbuffer_size = \"64KiB\"\n[limits]\nrecord = \"16KiB\"\n",
    );
    pair.send(1, 64);
    pair.assert_all_landed();
    pair.standin().stop_listening();
    // Two buffers hold some 40 of these.
    pair.send(400, 4096);
    assert!(pair.weir().metric("weir_rows_in_spool") > 300);
    pair.standin().resume().unwrap();
    pair.assert_all_landed();
}

#[test]
fn a_kill_between_blob_and_message_loses_nothing_and_stores_the_blob_once() {
    let mut pair = Pair::start(options(), "");
    pair.standin().script(fault(
        Target::QueuePost,
        usize::MAX,
        status(503, "ServerBusy", None),
    ));
    pair.send(1, 64);
    pair.weir().wait_for_metric("weir_kusto_blobs_put_total 1");
    pair.weir.as_ref().unwrap();
    let weir = pair.weir.take().unwrap();
    let admin = weir.admin;
    let directory = weir.kill();
    pair.standin().clear_faults();
    pair.weir = Some(Weir::start_logging(directory, &pair.config, admin, "info"));
    let landed = pair.standin().wait_for(PATIENCE, |standin| {
        Pair::landed(standin) == pair.acknowledged
    });
    assert!(landed, "{}", pair.weir().log());
    pair.weir().wait_for_metric("weir_rows_in_spool 0");
    pair.weir().assert_accounts_balance();
    let puts: BTreeSet<(String, u16)> = pair
        .standin()
        .requests()
        .into_iter()
        .filter(|seen| seen.target == Target::BlobPut)
        .map(|seen| (seen.path, seen.status))
        .collect();
    let paths: BTreeSet<&String> = puts.iter().map(|(path, _)| path).collect();
    let statuses: Vec<u16> = puts.iter().map(|(_, status)| *status).collect();
    assert_eq!(paths.len(), 1, "{puts:?}");
    assert_eq!(statuses, [201, 409], "{puts:?}");
}

#[test]
fn what_the_service_refuses_later_is_still_there_to_be_ingested() {
    let mut pair = Pair::start(options(), "");
    assert!(
        pair.standin()
            .drop_mapping(DATABASE, "Events", "fluent_bit_v1")
    );
    let reply = pair.weir().connect().post("/mapped", b"{\"n\":0}");
    assert_eq!(reply.status, 201);
    pair.acknowledged.insert(0);
    assert!(
        pair.standin()
            .wait_for(PATIENCE, |standin| standin.failures().len() == 1)
    );
    assert!(pair.standin().drop_table(DATABASE, "Records"));
    let reply = pair.weir().connect().post("/records", b"{\"a\":1}");
    assert_eq!(reply.status, 201);
    assert!(
        pair.standin()
            .wait_for(PATIENCE, |standin| standin.failures().len() == 2)
    );
    assert_eq!(
        pair.bench.failure_codes(),
        [
            "BadRequest_MappingReferenceWasNotFound",
            "BadRequest_TableNotExist"
        ]
    );
    // The blobs are kept: once the table and the mapping are there, the same messages ingest them.
    pair.standin()
        .create_table(&TableOptions::record(DATABASE, "Records"))
        .unwrap();
    pair.standin()
        .create_table(&TableOptions::fluent_bit(DATABASE, "Events"))
        .unwrap();
    for message in pair.standin().messages() {
        pair.bench.enqueue(&serde_json::from_str(&message).unwrap());
    }
    assert!(
        pair.standin()
            .wait_for(PATIENCE, |standin| standin.row_count(DATABASE, "Records")
                == 1)
    );
    pair.assert_all_landed();
}

#[test]
fn a_route_that_promises_delivery_answers_after_the_message() {
    let pair = Pair::start(options(), "[limits]\nack = \"500ms\"\n");
    let mut client = pair.weir().connect();
    let reply = client.post("/delivered", b"{\"n\":1}");
    assert_eq!(reply.status, 201, "{reply:?}");
    let posted = pair.standin().requests();
    let posted = posted
        .iter()
        .filter(|seen| seen.target == Target::QueuePost);
    assert!(posted.map(|seen| seen.status).eq([201]));

    pair.standin().script(fault(
        Target::QueuePost,
        usize::MAX,
        status(503, "ServerBusy", None),
    ));
    let reply = client.post("/delivered", b"{\"n\":2}");
    assert_eq!(
        (reply.status, reply.json()["code"].as_str()),
        (503, Some("ack_timeout"))
    );
    pair.standin().clear_faults();
    assert!(
        pair.standin()
            .wait_for(PATIENCE, |standin| standin.row_count(DATABASE, "Delivered")
                == 2)
    );
    pair.weir().wait_for_metric("weir_rows_in_spool 0");

    // Never a success for what will never be there.
    pair.standin().script(fault(
        Target::BlobPut,
        1,
        status(400, "InvalidHeaderValue", None),
    ));
    let reply = client.post("/delivered", b"{\"n\":3}");
    assert_eq!(
        (reply.status, reply.json()["code"].as_str()),
        (503, Some("dead_letter"))
    );
    let reply = client.post("/delivered", b"{\"n\":4}");
    assert_eq!(reply.status, 201, "{reply:?}");
    pair.weir().wait_for_metric("weir_dead_letter_rows_total 1");
    pair.weir().assert_accounts_balance();
}

#[test]
fn what_is_never_taken_is_a_dead_letter_that_can_be_looked_at_and_replayed() {
    let mut pair = Pair::start(options(), "");
    pair.standin().script(fault(
        Target::BlobPut,
        1,
        status(400, "InvalidHeaderValue", None),
    ));
    pair.send(1, 16);
    pair.weir().wait_for_metric("weir_dead_letter_rows_total 1");
    pair.weir().wait_for_metric("weir_rows_in_spool 0");
    pair.weir().assert_accounts_balance();
    let path = pair.weir().directory.path().to_owned();
    let (code, listed) = Pair::dead_letter(&path, &["ls"]);
    assert_eq!(code, Some(0), "{listed}");
    assert!(
        listed.contains("Telemetry.Events  1 rows") && listed.contains("InvalidHeaderValue"),
        "{listed}"
    );
    let name = listed.split(' ').next().unwrap().to_owned();
    let (_, shown) = Pair::dead_letter(&path, &["show", &name]);
    let shown: Value = serde_json::from_str(&shown).unwrap();
    assert_eq!(
        (&shown["rows"], &shown["step"]),
        (&1.into(), &"put_blob".into())
    );
    let (_, rows) = Pair::dead_letter(&path, &["show", &name, "--rows"]);
    assert!(rows.contains("\"log\":{\"n\":0,"), "{rows}");
    for command in ["replay", "drop"] {
        let (code, refused) = Pair::dead_letter(&path, &[command, "--all"]);
        assert_eq!(code, Some(1));
        assert!(refused.contains("in use by a running weir"), "{refused}");
    }

    let stopped = pair.weir.take().unwrap().stop();
    pair.standin().script(fault(
        Target::BlobPut,
        1,
        status(400, "InvalidHeaderValue", None),
    ));
    let path = stopped.directory.path();
    let (code, kept) = Pair::dead_letter(path, &["replay", "--all"]);
    assert_eq!(code, Some(1));
    assert!(
        kept.contains("kept ") && kept.contains("1 dead letters were not delivered"),
        "{kept}"
    );
    let (code, said) = Pair::dead_letter(path, &["replay", &name]);
    assert_eq!(code, Some(0), "{said}");
    assert!(
        pair.standin()
            .wait_for(PATIENCE, |standin| Pair::landed(standin)
                == pair.acknowledged)
    );
    let (_, listed) = Pair::dead_letter(path, &["ls"]);
    assert!(listed.starts_with("0 dead letters"), "{listed}");
    let (code, said) = Pair::dead_letter(path, &["drop", &name]);
    assert_eq!(code, Some(1));
    assert!(said.contains("no dead letter"), "{said}");
}

#[test]
fn a_dead_letter_that_does_not_fit_stays_in_the_spool() {
    let bench = Bench::start(options());
    let mut pair = Pair::start_beside(bench, "", "info");
    let small = pair.config.replace(
        "directory = \"dead-letter\"",
        "directory = \"dead-letter\"\nsize = 1",
    );
    pair.config = small;
    pair.kill_and_start();
    pair.standin().script(fault(
        Target::BlobPut,
        1,
        status(400, "InvalidHeaderValue", None),
    ));
    pair.send(1, 16);
    pair.weir()
        .wait_for_metric("weir_delivery_failures_total 1");
    pair.weir().wait_for_metric("weir_rows_in_spool 1");
    pair.weir().wait_for_metric("weir_dead_letter_rows_total 0");
    // The failure is counted before the letter is tried.
    let deadline = Instant::now() + PATIENCE;
    while !pair.weir().log().contains("dead_letter.size") {
        assert!(Instant::now() < deadline, "{}", pair.weir().log());
    }
    // What refused it has gone: the next run delivers it.
    pair.kill_and_start();
    let landed = pair.standin().wait_for(PATIENCE, |standin| {
        Pair::landed(standin) == pair.acknowledged
    });
    assert!(landed);
}

#[test]
fn no_line_of_the_log_holds_a_secret() {
    let mut pair = Pair::start_beside(Bench::start(options()), "", "trace");
    pair.standin().script(fault(
        Target::Token,
        1,
        status(503, "temporarily_unavailable", None),
    ));
    for target in [Target::BlobPut, Target::QueuePost] {
        pair.standin()
            .script(fault(target, 4, status(403, "AuthenticationFailed", None)));
        pair.standin()
            .script(fault(target, 4, status(503, "ServerBusy", None)));
        pair.standin()
            .script(fault(target, 1, Action::ResetMidBody));
    }
    pair.send(5, 64);
    pair.assert_all_landed();
    pair.standin().expire_sas();
    pair.standin().script(fault(
        Target::BlobPut,
        1,
        status(400, "InvalidHeaderValue", None),
    ));
    assert_eq!(
        pair.weir().connect().post("/records", b"{\"a\":1}").status,
        201
    );
    pair.weir().wait_for_metric("weir_rows_in_spool 0");
    let secrets = pair.standin().secrets();
    assert!(secrets.len() > 5 && secrets.contains(&options().client_secret));
    let stopped = pair.weir.take().unwrap().stop();
    let log = &stopped.stderr;
    assert!(
        log.contains("TRACE") && log.contains("ServerBusy"),
        "too quiet to prove anything"
    );
    for secret in secrets {
        if let Some(line) = log.lines().find(|line| line.contains(&secret)) {
            panic!("{secret} is in {line}");
        }
    }
    assert!(!log.contains("sig="), "a signature is in the log");
}
