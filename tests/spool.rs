//! What a success answer promises, seen from outside: whatever ends the process or the destination, it is kept.

mod support;

use std::collections::BTreeSet;
use std::time::Instant;

use support::{Client, Weir, base_config, free_address, noise, records, rows, run_to_its_end};

/// A record of some 4 KB that hardly compresses.
fn record(index: usize, noise: &mut impl Iterator<Item = u64>) -> String {
    let pad: String = noise
        .take(250)
        .map(|number| format!("{number:x}"))
        .collect();
    format!("{{\"i\":{index},\"pad\":\"{pad}\"}}")
}

fn sorted(mut records: Vec<String>) -> Vec<String> {
    records.sort();
    records
}

/// Small buffers, so that few records make many batches.
const SMALL: &str =
    "[upload]\nbuffer_count = 2\nbuffer_size = \"64KiB\"\n[limits]\nrecord = \"16KiB\"\n";

#[test]
fn every_success_says_which_promise_was_kept() {
    let weir = Weir::start(
        "[[route]]\npath = \"/memory\"\nack = \"memory\"\n[[route]]\npath = \"/durable\"\n\
         [[route]]\npath = \"/delivered\"\nack = \"delivered\"\ntable = \"Delivered\"\n",
    );
    let mut client = weir.connect();
    for ack in ["memory", "durable", "delivered"] {
        let reply = client.post(
            &format!("/{ack}"),
            format!("{{\"ack\":\"{ack}\"}}").as_bytes(),
        );
        assert_eq!(reply.status, 201, "{reply:?}");
        let field = format!("\r\nWeir-Ack: {ack}\r\n");
        assert!(reply.head.contains(&field), "{reply:?}");
    }
    // The one that promised delivery kept it before it answered; an empty array promises nothing and is answered.
    let delivered = weir.directory.path().join("out/Telemetry/Delivered");
    assert_eq!(records(&rows(&delivered)), ["{\"ack\":\"delivered\"}"]);
    assert_eq!(client.post("/delivered", b"[]").json()["accepted"], 0);
    let stopped = weir.stop();
    let events = sorted(records(&stopped.rows("Telemetry", "Events")));
    assert_eq!(events, ["{\"ack\":\"durable\"}", "{\"ack\":\"memory\"}"]);
}

#[test]
fn what_was_acknowledged_is_delivered_after_a_kill_also_to_a_table_no_longer_configured() {
    let admin = free_address();
    let route = "[[route]]\npath = \"/old\"\ntable = \"Old\"\n[[route]]\npath = \"/*\"\n";
    let weir = Weir::start_with(&format!("{}{SMALL}{route}", base_config(admin)), admin);
    for table in ["Events", "Old"] {
        weir.block_delivery(table, true);
    }
    let mut client = weir.connect();
    let mut noise = noise();
    let mut sent: [Vec<String>; 2] = Default::default();
    for index in 0..60 {
        let record = record(index, &mut noise);
        let path = ["/x", "/old"][index % 2];
        assert_eq!(client.post(path, record.as_bytes()).status, 201);
        sent[index % 2].push(record);
    }
    let directory = weir.kill();
    for table in ["Events", "Old"] {
        support::block_delivery(directory.path(), table, false);
    }
    // Another number of cores, another size of segment, another set of tables.
    let config = format!("cores = \"all\"\n{}", base_config(admin));
    let weir = Weir::start_in(directory, &config, admin);
    weir.wait_for_metric("weir_recovered_rows_total 60");
    weir.wait_for_metric("weir_rows_in_spool 0");
    assert_eq!(weir.metric("weir_quarantined_segments_total"), 0);
    assert_eq!(weir.connect().post("/x", b"{\"new\":1}").status, 201);
    sent[0].push("{\"new\":1}".into());
    let stopped = weir.stop();
    for (table, sent) in ["Events", "Old"].into_iter().zip(sent) {
        let delivered = records(&stopped.rows("Telemetry", table));
        assert_eq!(sorted(delivered), sorted(sent), "{table}");
    }
}

#[test]
fn a_kill_after_the_delivery_delivers_nothing_twice() {
    let admin = free_address();
    let config = base_config(admin);
    let weir = Weir::start_with(&config, admin);
    assert_eq!(weir.connect().post("/x", b"{\"a\":1}").status, 201);
    weir.wait_for_metric("weir_delivered_rows_total 1");
    let weir = Weir::start_in(weir.kill(), &config, admin);
    assert_eq!(weir.connect().post("/x", b"{\"a\":2}").status, 201);
    let stopped = weir.stop();
    let rows = stopped.rows("Telemetry", "Events");
    assert_eq!(records(&rows), ["{\"a\":1}", "{\"a\":2}"]);
}

#[test]
fn a_drain_leaves_what_cannot_be_delivered_in_the_spool() {
    let admin = free_address();
    let config = base_config(admin);
    let weir = Weir::start_with(&config, admin);
    weir.block_delivery("Events", true);
    assert_eq!(weir.connect().post("/x", b"{\"a\":1}").status, 201);
    let stopped = weir.stop();
    let said = "undelivered batches stay in the spool";
    assert!(stopped.stderr.contains(said), "{}", stopped.stderr);
    support::block_delivery(stopped.directory.path(), "Events", false);
    let weir = Weir::start_in(stopped.directory, &config, admin);
    weir.wait_for_metric("weir_delivered_rows_total 1");
    assert_eq!(
        records(&weir.stop().rows("Telemetry", "Events")),
        ["{\"a\":1}"]
    );
}

#[test]
fn a_spent_spool_refuses_and_drains_by_itself_and_memory_stays_where_it_was() {
    let admin = free_address();
    let config = base_config(admin).replace("64MiB", "8MiB");
    let weir = Weir::start_with(&format!("{config}{SMALL}"), admin);
    weir.block_delivery("Events", true);
    let mut client = weir.connect();
    let mut noise = noise();
    let mut accepted = Vec::new();
    let mut resident = 0;
    let refused = loop {
        let record = record(accepted.len(), &mut noise);
        let reply = client.post("/x", record.as_bytes());
        if reply.status == 503 {
            break reply;
        }
        assert_eq!(reply.status, 201, "{reply:?}");
        accepted.push(record);
        if accepted.len() == 200 {
            resident = weir.metric("weir_resident_memory_bytes");
        }
        assert!(accepted.len() < 10_000, "the spool never runs out");
    };
    assert_eq!(refused.json()["code"], "spool_full");
    assert!(
        refused.head.contains("\r\nRetry-After: ") && !refused.closes(),
        "{refused:?}"
    );
    // Far more than the two upload buffers hold, and none of it was evicted.
    assert!(accepted.len() > 2_000, "{}", accepted.len());
    let (status, reason) = weir.admin_get("/readyz");
    assert!(
        status == 503 && reason.starts_with("spool_full: "),
        "{status} {reason}"
    );
    assert_eq!(weir.admin_get("/livez").0, 200);
    let grown = weir
        .metric("weir_resident_memory_bytes")
        .saturating_sub(resident);
    assert!(
        grown < 4 << 20,
        "{grown} bytes more, of some 8 MiB in the spool"
    );

    weir.block_delivery("Events", false);
    weir.wait_for_metric("weir_rows_in_spool 0");
    assert_eq!(weir.admin_get("/readyz").0, 200);
    assert_eq!(client.post("/x", b"{\"after\":1}").status, 201);
    accepted.push("{\"after\":1}".into());
    weir.wait_for_metric(&format!("weir_delivered_rows_total {}", accepted.len()));
    weir.assert_accounts_balance();
    assert_eq!(weir.outcomes(), [accepted.len() as u64, 0, 1, 0]);
    let delivered = records(&weir.stop().rows("Telemetry", "Events"));
    assert_eq!(sorted(delivered), sorted(accepted));
}

#[test]
fn a_request_larger_than_what_is_left_of_the_spool_is_refused_whole() {
    let admin = free_address();
    let config = base_config(admin).replace("64MiB", "1MiB");
    let weir = Weir::start_with(&format!("{config}{SMALL}"), admin);
    weir.block_delivery("Events", true);
    let mut noise = noise();
    let mut client = weir.connect();
    let mut sent = Vec::new();
    let mut accepted = 0;
    let refused = loop {
        // More than a segment holds.
        let many: Vec<String> = (0..30).map(|index| record(index, &mut noise)).collect();
        let reply = client.post("/x", many.join("\n").as_bytes());
        if reply.status == 503 {
            break reply;
        }
        assert_eq!(reply.status, 201, "{reply:?}");
        accepted += 1;
        sent.extend(many);
        assert!(accepted < 1_000, "the spool never runs out");
    };
    assert_eq!(refused.json()["code"], "spool_full");
    assert!(accepted > 3, "{accepted}");
    // Nothing of the refused one was stored: a smaller one still finds room.
    assert_eq!(weir.metric("weir_records_unacknowledged_total"), 0);
    assert_eq!(weir.metric("weir_rows_total"), 30 * accepted);
    assert_eq!(client.post("/x", b"{\"small\":1}").status, 201);
    sent.push("{\"small\":1}".into());
    assert_eq!(weir.outcomes(), [accepted + 1, 0, 1, 0]);
    weir.block_delivery("Events", false);
    weir.wait_for_metric(&format!("weir_delivered_rows_total {}", sent.len()));
    let delivered = records(&weir.stop().rows("Telemetry", "Events"));
    assert_eq!(sorted(delivered), sorted(sent));
}

#[test]
fn a_delivery_that_takes_too_long_is_said_and_comes_later() {
    let weir = Weir::start("[limits]\nack = \"100ms\"\n[[route]]\nack = \"delivered\"\n");
    weir.block_delivery("Events", true);
    let mut client = weir.connect();
    let reply = client.post("/x", b"{\"late\":1}");
    assert_eq!(
        (reply.status, reply.json()["code"].as_str()),
        (503, Some("ack_timeout"))
    );
    weir.block_delivery("Events", false);
    weir.wait_for_metric("weir_delivered_rows_total 1");
    let reply = client.post("/x", b"{\"soon\":1}");
    assert_eq!(reply.status, 201, "{reply:?}");
    weir.assert_accounts_balance();
    assert_eq!(weir.metric("weir_records_unacknowledged_total"), 1);
    let delivered = records(&weir.stop().rows("Telemetry", "Events"));
    assert_eq!(delivered, ["{\"late\":1}", "{\"soon\":1}"]);
}

#[test]
fn many_wait_for_one_delivery_and_each_is_answered() {
    let weir = Weir::start("[[route]]\nack = \"delivered\"\n");
    let begun_at = Instant::now();
    let mut clients: Vec<Client> = (0..20).map(|_| weir.connect()).collect();
    for round in 0..5 {
        for (index, client) in clients.iter_mut().enumerate() {
            let body = format!("{{\"i\":{}}}", round * 20 + index);
            client.send(&support::request("/x", body.as_bytes()));
        }
        for client in &mut clients {
            let reply = client.reply();
            assert_eq!(
                reply.status,
                201,
                "{reply:?} after {:?}",
                begun_at.elapsed()
            );
        }
    }
    // They share batches: far fewer than requests.
    assert!(weir.metric("weir_blobs_total") < 60);
    let delivered: BTreeSet<String> = records(&weir.stop().rows("Telemetry", "Events"))
        .into_iter()
        .collect();
    assert_eq!(delivered.len(), 100);
}

#[test]
fn a_second_weir_on_the_same_spool_does_not_start() {
    let weir = Weir::start("");
    let config = base_config(free_address()).replace(
        "directory = \"spool\"",
        &format!("directory = {:?}", weir.directory.path().join("spool")),
    );
    let directory = tempfile::tempdir().unwrap();
    let (code, stderr) = run_to_its_end(directory.path(), &config);
    assert_eq!(code, Some(1));
    assert!(stderr.contains("is in use by another weir"), "{stderr}");
}

#[test]
fn a_segment_of_another_version_is_refused_and_left_alone() {
    let admin = free_address();
    let config = base_config(admin);
    let weir = Weir::start_with(&config, admin);
    weir.block_delivery("Events", true);
    assert_eq!(weir.connect().post("/x", b"{\"a\":1}").status, 201);
    let directory = weir.kill();
    support::block_delivery(directory.path(), "Events", false);
    let segment = std::fs::read_dir(directory.path().join("spool"))
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .find(|path| std::fs::read(path).unwrap().get(512..520) == Some(b"weirsegm"))
        .expect("the segment that was written");
    let written = std::fs::read(&segment).unwrap();
    for version in [0_u32, 3] {
        let mut other = written.clone();
        other[520..524].copy_from_slice(&version.to_le_bytes());
        std::fs::write(&segment, &other).unwrap();
        let (code, stderr) = run_to_its_end(directory.path(), &config);
        assert_eq!(code, Some(1));
        let said = format!("has format version {version}, and this weir reads versions 1 to 2");
        assert!(stderr.contains(&said), "{stderr}");
        assert_eq!(std::fs::read(&segment).unwrap(), other);
    }
    std::fs::write(&segment, &written).unwrap();
    let weir = Weir::start_in(directory, &config, admin);
    weir.wait_for_metric("weir_delivered_rows_total 1");
}

#[test]
fn without_a_spooled_table_no_spool_is_made() {
    let weir = Weir::start("[[route]]\nack = \"memory\"\n");
    assert_eq!(weir.connect().post("/x", b"{}").status, 201);
    assert!(!weir.directory.path().join("spool").exists());
    assert_eq!(weir.stop().rows("Telemetry", "Events").len(), 1);
}

/// `weir spool` with these arguments; its exit code and what it printed.
fn spool_command(directory: &std::path::Path, arguments: &[&str]) -> (Option<i32>, String) {
    let output = std::process::Command::new(env!("CARGO_BIN_EXE_weir"))
        .current_dir(directory)
        .arg("spool")
        .args(arguments)
        .output()
        .unwrap();
    let mut text = String::from_utf8(output.stdout).unwrap();
    text.push_str(&String::from_utf8(output.stderr).unwrap());
    (output.status.code(), text)
}

#[test]
fn the_spool_can_be_listed_checked_and_read() {
    let weir = Weir::start("");
    weir.block_delivery("Events", true);
    let mut client = weir.connect();
    for index in 0..3 {
        let body = format!("{{\"i\":{index}}}");
        assert_eq!(client.post("/x", body.as_bytes()).status, 201);
    }
    let directory = weir.kill();
    let directory = directory.path();
    let arguments = ["--config", "weir.toml"];
    let (code, listed) = spool_command(directory, &["ls", "--config", "weir.toml"]);
    assert_eq!(code, Some(0), "{listed}");
    let line = listed.lines().next().unwrap();
    let segment = line.split(' ').next().unwrap();
    for part in [
        "segment-",
        "pending",
        "Telemetry.Events",
        "-c0-00000000.json.gz",
    ] {
        assert!(line.contains(part), "{listed}");
    }
    assert!(
        listed.lines().last().unwrap().ends_with(" free"),
        "{listed}"
    );

    let (code, verified) = spool_command(directory, &["verify", "--config", "weir.toml"]);
    assert_eq!(code, Some(0), "{verified}");
    assert!(verified.contains("3 frames, 3 rows: ok\n"), "{verified}");
    let cat = [&["cat"][..], &arguments, &[segment]].concat();
    let (code, rows) = spool_command(directory, &cat);
    assert_eq!(code, Some(0), "{rows}");
    let rows: Vec<String> = rows.lines().map(str::to_owned).collect();
    assert_eq!(records(&rows), ["{\"i\":0}", "{\"i\":1}", "{\"i\":2}"]);

    // The first frame's payload: what is behind it was durable, so this is damage.
    let path = directory.join("spool").join(segment);
    let mut bytes = std::fs::read(&path).unwrap();
    bytes[4096 + 70] ^= 1;
    std::fs::write(&path, bytes).unwrap();
    let (code, verified) = spool_command(directory, &["verify", "--config", "weir.toml"]);
    assert_eq!(code, Some(1), "{verified}");
    let said = "DAMAGED: 3 rows behind them cannot be read";
    assert!(verified.contains(said), "{verified}");
    let (code, text) = spool_command(directory, &["cat", "segment-99999999"]);
    assert!(
        code == Some(1) && text.contains("cannot use the spool"),
        "{text}"
    );
}

#[test]
fn a_damaged_segment_is_put_aside_counted_and_never_used_again() {
    let admin = free_address();
    let config = base_config(admin);
    let weir = Weir::start_with(&config, admin);
    weir.block_delivery("Events", true);
    let mut client = weir.connect();
    for index in 0..3 {
        let body = format!("{{\"i\":{index}}}");
        assert_eq!(client.post("/x", body.as_bytes()).status, 201);
    }
    let directory = weir.kill();
    support::block_delivery(directory.path(), "Events", false);
    let segment = std::fs::read_dir(directory.path().join("spool"))
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .find(|path| std::fs::read(path).unwrap().get(512..520) == Some(b"weirsegm"))
        .expect("the segment that was written");
    let mut bytes = std::fs::read(&segment).unwrap();
    // The payload of the second frame, which is one sector like the first.
    bytes[4096 + 512 + 70] ^= 1;
    std::fs::write(&segment, bytes).unwrap();
    let weir = Weir::start_in(directory, &config, admin);
    weir.wait_for_metric("weir_quarantined_segments_total 1");
    assert_eq!(weir.metric("weir_quarantined_rows_total"), 2);
    assert_eq!(weir.metric("weir_recovered_rows_total"), 1);
    let quarantined = segment
        .to_str()
        .unwrap()
        .replace("segment-", "quarantined-");
    let quarantined = std::path::Path::new(&quarantined).file_name().unwrap();
    assert!(
        weir.directory
            .path()
            .join("spool")
            .join(quarantined)
            .exists()
    );
    let stopped = weir.stop();
    assert!(
        stopped.stderr.contains("a segment is damaged"),
        "{}",
        stopped.stderr
    );
    assert_eq!(records(&stopped.rows("Telemetry", "Events")), ["{\"i\":0}"]);
}

#[test]
fn a_start_with_something_to_deliver_does_not_need_the_destination() {
    let admin = free_address();
    let config = base_config(admin);
    let weir = Weir::start_with(&config, admin);
    weir.block_delivery("Events", true);
    assert_eq!(weir.connect().post("/x", b"{\"a\":1}").status, 201);
    // It is still in the way, and is put right only later, without the directory even.
    let weir = Weir::start_in(weir.kill(), &config, admin);
    assert_eq!(weir.connect().post("/x", b"{\"a\":2}").status, 201);
    std::fs::remove_file(weir.directory.path().join("out/Telemetry/Events")).unwrap();
    weir.wait_for_metric("weir_delivered_rows_total 2");
    let delivered = records(&weir.stop().rows("Telemetry", "Events"));
    assert_eq!(sorted(delivered), ["{\"a\":1}", "{\"a\":2}"]);
}

#[test]
fn a_start_waits_for_the_writes_of_the_process_before_it() {
    use std::io::{BufRead, BufReader};
    let admin = free_address();
    let config = base_config(admin);
    let weir = Weir::start_with(&config, admin);
    let directory = weir.kill();
    // What a write on its way holds in the kernel, after its process has ended.
    let segment = std::fs::File::open(directory.path().join("spool/segment-00000003")).unwrap();
    rustix::fs::flock(&segment, rustix::fs::FlockOperation::LockExclusive).unwrap();
    let mut child = support::command(directory.path(), &config).spawn().unwrap();
    let mut log = BufReader::new(child.stderr.take().unwrap()).lines();
    let waits = log.find(|line| {
        line.as_ref()
            .is_ok_and(|line| line.contains("waiting for a write of the last run"))
    });
    assert!(waits.is_some(), "it did not wait");
    drop(segment);
    let mut stdout = BufReader::new(child.stdout.take().unwrap());
    let mut line = String::new();
    stdout.read_line(&mut line).unwrap();
    assert!(line.starts_with("listening on "), "{line}");
    child.kill().unwrap();
    child.wait().unwrap();
}
