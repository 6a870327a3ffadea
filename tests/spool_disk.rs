//! Real file systems that have no space, or turn read-only, under a running weir.
//!
//! They are mounted for the test, which takes root; without it the tests say so and end.

mod support;

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

use support::{PATIENCE, Weir, base_config, free_address, records, rows};

/// A file system mounted for one test.
struct Mount {
    path: PathBuf,
    directory: tempfile::TempDir,
}

fn run(program: &str, arguments: &[&str]) -> Result<(), String> {
    let output = Command::new(program).args(arguments).output();
    match output {
        Ok(output) if output.status.success() => Ok(()),
        Ok(output) => Err(String::from_utf8_lossy(&output.stderr).into_owned()),
        Err(error) => Err(format!("{program}: {error}")),
    }
}

fn wait_until(what: &str, mut is_so: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !is_so() {
        assert!(Instant::now() < deadline, "{what}");
        std::thread::yield_now();
    }
}

impl Mount {
    /// `None` where this user may not mount.
    fn new(prepare: impl FnOnce(&Path) -> Vec<String>) -> Option<Mount> {
        if !rustix::process::geteuid().is_root() {
            eprintln!("not root, so nothing can be mounted: skipped");
            return None;
        }
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("mounted");
        std::fs::create_dir(&path).unwrap();
        let mut arguments = prepare(directory.path());
        arguments.push(path.to_str().unwrap().to_owned());
        let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
        if let Err(error) = run("mount", &arguments) {
            // What a container without that capability says; anything else is a fault of this test.
            assert!(error.contains("permission denied"), "{error}");
            eprintln!("mounting is not allowed here ({error}): skipped");
            return None;
        }
        Some(Mount { path, directory })
    }

    fn tmpfs(size: &str) -> Option<Mount> {
        let size = format!("size={size}");
        Mount::new(|_| {
            ["-t", "tmpfs", "-o", &size, "none"]
                .map(str::to_owned)
                .into()
        })
    }

    /// An ext4 that turns read-only when it meets an error.
    fn ext4() -> Option<Mount> {
        Mount::new(|directory| {
            let image = directory.join("image");
            let file = std::fs::File::create(&image).unwrap();
            file.set_len(64 << 20).unwrap();
            let image = image.to_str().unwrap();
            run("mkfs.ext4", &["-q", image]).unwrap();
            ["-o", "loop,errors=remount-ro", image]
                .map(str::to_owned)
                .into()
        })
    }

    /// Takes all the space that is left but `free` bytes.
    fn fill(&self, free: u64) {
        let stat = rustix::fs::statvfs(&self.path).unwrap();
        let left = stat.f_bavail * stat.f_frsize;
        let file = std::fs::File::create(self.path.join("filler")).unwrap();
        let size = left.saturating_sub(free);
        rustix::fs::fallocate(&file, rustix::fs::FallocateFlags::empty(), 0, size).unwrap();
    }

    fn unfill(&self) {
        std::fs::remove_file(self.path.join("filler")).unwrap();
    }

    /// The device of the loop mount.
    fn device(&self) -> String {
        let mounts = std::fs::read_to_string("/proc/self/mounts").unwrap();
        let path = self.path.to_str().unwrap();
        let line = mounts
            .lines()
            .find(|line| line.split(' ').nth(1) == Some(path));
        let device = line.unwrap().split(' ').next().unwrap();
        device.rsplit('/').next().unwrap().to_owned()
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        let path = self.path.to_str().unwrap();
        if let Err(error) = run("umount", &[path]) {
            eprintln!("{path} stays mounted: {error}");
        }
        let _ = &self.directory;
    }
}

/// Segments of a few hundred KiB, so that a small file system holds many.
const SMALL: &str =
    "[upload]\nbuffer_count = 2\nbuffer_size = \"512KiB\"\n[limits]\nrecord = \"64KiB\"\n";

fn config(admin: std::net::SocketAddr, spool: &Path, size: &str) -> String {
    let config = base_config(admin)
        .replace("directory = \"spool\"", &format!("directory = {:?}", spool))
        .replace("64MiB", size);
    format!("{config}{SMALL}")
}

#[test]
fn space_that_is_missing_at_start_is_taken_when_it_is_there() {
    let Some(mount) = Mount::tmpfs("16m") else {
        return;
    };
    mount.fill(0);
    let admin = free_address();
    let weir = Weir::start_with(&config(admin, &mount.path.join("spool"), "12MiB"), admin);
    let mut client = weir.connect();
    let reply = client.post("/x", b"{\"a\":0}");
    assert_eq!(
        (reply.status, reply.json()["code"].as_str()),
        (503, Some("spool_full"))
    );
    assert_eq!(weir.admin_get("/readyz").0, 503);
    mount.unfill();
    let count = weir.metric("weir_spool_segments");
    weir.wait_for_metric(&format!("weir_spool_segments_free {count}"));
    assert_eq!(weir.admin_get("/readyz").0, 200);
    assert_eq!(client.post("/x", b"{\"a\":1}").status, 201);
    let stopped = weir.stop();
    let said = "the disk has no space for the whole spool";
    assert!(stopped.stderr.contains(said), "{}", stopped.stderr);
    assert_eq!(records(&stopped.rows("Telemetry", "Events")), ["{\"a\":1}"]);
}

#[test]
fn a_disk_that_fills_up_under_a_running_weir_does_not_matter() {
    let Some(mount) = Mount::tmpfs("16m") else {
        return;
    };
    // Half of the disk is somebody else's, so a part of the spool is missing.
    mount.fill(8 << 20);
    let admin = free_address();
    let weir = Weir::start_with(&config(admin, &mount.path.join("spool"), "12MiB"), admin);
    let free = weir.metric("weir_spool_segments_free");
    assert!(
        free > 4 && free < weir.metric("weir_spool_segments"),
        "{free}"
    );
    // And now the rest is gone too: what there is of the spool was taken at start.
    let rest = std::fs::File::create(mount.path.join("rest")).unwrap();
    loop {
        let stat = rustix::fs::statvfs(&mount.path).unwrap();
        let left = stat.f_bavail * stat.f_frsize;
        if left == 0 {
            break;
        }
        let size = rest.metadata().unwrap().len() + left;
        match rustix::fs::fallocate(&rest, rustix::fs::FallocateFlags::empty(), 0, size) {
            // weir tries for the missing part of its spool at the same time, and gives back what is not enough.
            Ok(()) | Err(rustix::io::Errno::NOSPC) => {}
            Err(error) => panic!("{error}"),
        }
    }
    let mut client = weir.connect();
    let mut noise = support::noise();
    let mut sent = Vec::new();
    for index in 0..400 {
        let pad: String = noise
            .by_ref()
            .take(2_000)
            .map(|number| format!("{number:x}"))
            .collect();
        let record = format!("{{\"i\":{index},\"pad\":\"{pad}\"}}");
        assert_eq!(client.post("/x", record.as_bytes()).status, 201);
        sent.push(record);
    }
    assert_eq!(weir.metric("weir_commit_failures_total"), 0);
    let mut delivered = records(&weir.stop_delivered().rows("Telemetry", "Events"));
    delivered.sort();
    sent.sort();
    assert_eq!(delivered, sent);
}

#[test]
fn a_disk_that_turns_read_only_takes_nothing_more_and_keeps_what_it_has() {
    let Some(mount) = Mount::ext4() else {
        return;
    };
    let trigger = format!("/sys/fs/ext4/{}/trigger_fs_error", mount.device());
    let admin = free_address();
    let spool = mount.path.join("spool");
    let weir = Weir::start_with(&config(admin, &spool, "12MiB"), admin);
    weir.block_delivery("Events", true);
    let mut client = weir.connect();
    for index in 0..20 {
        let body = format!("{{\"i\":{index}}}");
        assert_eq!(client.post("/x", body.as_bytes()).status, 201);
    }
    std::fs::write(&trigger, "1").unwrap();
    // Error handling has a thread of its own, and the disk takes commits until that has run.
    let probe = mount.path.join("probe");
    wait_until("the disk takes files", || {
        std::fs::write(&probe, "").is_err()
    });
    let mut refused = 0;
    for _ in 0..3 {
        let reply = client.post("/x", b"{\"refused\":1}");
        assert_eq!(
            (reply.status, reply.json()["code"].as_str()),
            (503, Some("storage_fault"))
        );
        refused += 1;
    }
    weir.wait_for_metric("weir_storage_failed_cores 1");
    let (status, reason) = weir.admin_get("/readyz");
    assert!(
        status == 503 && reason.starts_with("storage_fault: "),
        "{reason}"
    );
    assert_eq!(weir.outcomes(), [20, 0, refused, 0]);
    // Killed, and the file system repaired: everything acknowledged is still there.
    let directory = weir.kill();
    support::block_delivery(directory.path(), "Events", false);
    let path = mount.path.to_str().unwrap();
    // The kernel ends a ring, and closes the files of its writes, after the process is gone.
    wait_until("the disk is in use", || run("umount", &[path]).is_ok());
    let image = mount.directory.path().join("image");
    // 1: errors were corrected.
    let _ = run("e2fsck", &["-fy", image.to_str().unwrap()]);
    run("mount", &["-o", "loop", image.to_str().unwrap(), path]).unwrap();
    let weir = Weir::start_in(directory, &config(admin, &spool, "12MiB"), admin);
    // In as many batches as were sealed by age while the requests came.
    wait_until("a row is never recovered", || {
        weir.metric("weir_recovered_rows_total") >= 20
    });
    weir.wait_for_metric("weir_rows_in_spool 0");
    let delivered = records(&rows(&weir.directory.path().join("out/Telemetry/Events")));
    for index in 0..20 {
        let record = format!("{{\"i\":{index}}}");
        assert!(
            delivered.contains(&record),
            "{record} is lost: {delivered:?}"
        );
    }
    drop(weir);
}
