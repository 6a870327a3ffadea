//! `weir check`: is the configuration valid, and is it likely what was meant?
//!
//! Nothing is opened, bound or started, so it can run beside a running node and in CI.
//! A sum above this machine's limit, and certificates that are not there or do not work, are warnings here: the file may
//! be meant for another machine.
//!
//! With `--online` the way to Kusto is walked as well, one line per step; nothing is ingested.

use super::{ConfigArgs, print, warnings_text};
use crate::budget::machine::Machine;
use crate::budget::{Budget, Registration};
use crate::config::{Config, Destination, Registered};
use crate::error::Fatal;
use crate::tls;
use crate::uplink::kusto::online::{Finding, Verdict, walk};

pub(super) fn run(args: &ConfigArgs, online: bool) -> Result<(), Fatal> {
    let config = args.load()?;
    let machine = Machine::read();
    let budget = Budget::new(&config);
    let mut warnings = budget.warnings(&config, &machine);
    let registration = budget.registration(&machine);
    if config.slabs.registered == Registered::Prefer && registration != Registration::Expected {
        warnings.push(format!("slabs will be {registration}"));
    }
    if let Err(fatal) = budget.verify(&config, &machine) {
        warnings.push(format!("weir will not start here: {fatal}"));
    }
    warnings.extend(tls::faults(&config).map(|fatal| format!("weir will not start here: {fatal}")));
    print(&format!(
        "{}: valid\n{}",
        args.name(),
        warnings_text(&warnings)
    ))?;
    match online {
        true => check_online(&config),
        false => Ok(()),
    }
}

fn check_online(config: &Config) -> Result<(), Fatal> {
    let Destination::Kusto(kusto) = &config.destination else {
        return print("online: nothing to try, the destination is not Kusto\n");
    };
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|source| Fatal::Io {
            action: "starting the runtime".into(),
            source,
        })?;
    let mut failure_count = 0;
    let mut printed = Ok(());
    let mut found = |finding: Finding| {
        failure_count += usize::from(finding.verdict == Verdict::Failed);
        // Each as it is found: some steps take a while.
        if printed.is_ok() {
            printed = print(&line(&finding));
        }
    };
    runtime.block_on(walk(kusto, &config.tables, &mut found))?;
    printed?;
    match failure_count {
        0 => Ok(()),
        failure_count => Err(Fatal::OnlineCheck { failure_count }),
    }
}

fn line(finding: &Finding) -> String {
    let verdict = match finding.verdict {
        Verdict::Ok => "ok",
        Verdict::Unknown => "unknown",
        Verdict::Failed => "FAILED",
    };
    format!("{verdict:<8}{:<10}{}\n", finding.step, finding.detail)
}
