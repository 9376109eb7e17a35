//! Evaluation of a scenario's goals.

use crate::{
    compare::name,
    report::{Event, GoalResult, Run},
    scenario::{Congestion, Goal, Scenario},
};

/// Every measure that a goal can name, after the workload's name if it has one, and its unit.
pub(crate) const MEASURES: [(&str, &str); 19] = [
    ("p50", "ms"),
    ("p90", "ms"),
    ("p99", "ms"),
    ("max", "ms"),
    ("mbit", "Mbit/s"),
    ("per_second", "/s"),
    ("errors", ""),
    ("overdue", ""),
    ("cpu_per_gib", "s"),
    ("server_memory_per_session", "KiB"),
    ("agent_memory_per_session", "KiB"),
    ("ready_seconds", "s"),
    ("switch_seconds", "s"),
    ("switches", ""),
    ("joined_seconds", "s"),
    ("rejoined_seconds", "s"),
    ("memory_per_agent", "KiB"),
    ("idle_cpu_percent", "%"),
    ("cpu_per_return", "ms"),
];

/// Evaluates every goal of the scenario for every peer that ran and has to reach it, with the first
/// of the scenario's congestion controls.
pub(super) fn judge(scenario: &Scenario, runs: &[Run]) -> Vec<GoalResult> {
    let tcp = scenario.congestion.first().copied().unwrap_or(Congestion::Cubic);
    let mut results = Vec::new();
    for goal in &scenario.goals {
        for peer in &goal.peers {
            let peer_name = name(*peer, tcp);
            if !runs.iter().any(|run| run.peer == peer_name) {
                continue;
            }
            let incumbent = peer.incumbent().map(|peer| name(peer, tcp));
            let value = |peer: &str| median(scenario, runs, peer, &goal.measure);
            let (measured, against) = (value(&peer_name), incumbent.as_deref().and_then(value));
            results.push(goal.result(peer_name, measured, against));
        }
    }
    results
}

impl Goal {
    fn result(&self, peer: String, measured: Option<f64>, against: Option<f64>) -> GoalResult {
        let relative = self.at_most_times.is_some() || self.at_least_times.is_some();
        let measured = match (relative, measured, against) {
            (false, measured, _) => measured,
            (true, Some(ours), Some(theirs)) => Some(ours / theirs).filter(|x| x.is_finite()),
            (true, ..) => None,
        };
        let (least, most) = if relative {
            (self.at_least_times, self.at_most_times)
        } else {
            (self.at_least, self.at_most)
        };
        let (sign, limit) = match (least, most) {
            (Some(least), _) => ("≥", least),
            (None, most) => ("≤", most.unwrap_or(f64::NAN)),
        };
        let reached = measured.is_some_and(|measured| {
            least.is_none_or(|least| measured >= least) && most.is_none_or(|most| measured <= most)
        });
        let unit = if relative { "×" } else { self.unit() }.to_owned();
        let than = if relative { " Konnectivity's" } else { "" };
        let goal = format!("{} {sign} {limit} {unit}{than}", self.measure.replace('.', " "));
        GoalResult { peer, goal: goal.trim().into(), measured, unit, reached }
    }

    fn unit(&self) -> &'static str {
        let measure = self.measure.split_once('.').map_or(&*self.measure, |(_, measure)| measure);
        MEASURES.iter().find(|(name, _)| *name == measure).map_or("", |(_, unit)| unit)
    }
}

/// The median over a peer's runs; of two, the worse is not hidden: it is their mean.
fn median(scenario: &Scenario, runs: &[Run], peer: &str, measure: &str) -> Option<f64> {
    let of_peer = runs.iter().filter(|run| run.peer == peer);
    let values: Option<Vec<_>> = of_peer.map(|run| value(scenario, run, measure)).collect();
    let mut values = values?;
    values.sort_by(f64::total_cmp);
    let (low, high) = (values.get((values.len().max(1) - 1) / 2)?, values.get(values.len() / 2)?);
    Some((low + high) / 2.0)
}

fn value(scenario: &Scenario, run: &Run, measure: &str) -> Option<f64> {
    if run.failure.is_some() {
        return None;
    }
    let Some((workload, measure)) = measure.split_once('.') else {
        return process_value(scenario, run, measure);
    };
    let result = run.workloads.iter().find(|result| result.name == workload)?;
    let latency = result.latency.as_ref().filter(|latency| latency.count > 0);
    match measure {
        "p50" => latency.map(|latency| latency.p50),
        "p90" => latency.map(|latency| latency.p90),
        "p99" => latency.map(|latency| latency.p99),
        "max" => latency.map(|latency| latency.max),
        "overdue" => latency.map(|latency| latency.overdue as f64),
        "mbit" => result.mbit_per_second,
        "per_second" => result.per_second,
        "errors" => Some(result.errors.values().sum::<u64>() as f64),
        _ => None,
    }
}

fn process_value(scenario: &Scenario, run: &Run, measure: &str) -> Option<f64> {
    if let Some(fleet) = &run.fleet {
        return match measure {
            "joined_seconds" => fleet.joined_seconds,
            "rejoined_seconds" => fleet.rejoined_seconds,
            "memory_per_agent" => Some(fleet.memory_per_agent),
            "idle_cpu_percent" => Some(fleet.idle_cpu_percent),
            "cpu_per_return" => fleet.cpu_per_return,
            _ => None,
        };
    }
    match measure {
        "ready_seconds" => return run.ready_seconds,
        "switch_seconds" => {
            let due = scenario.events.iter().filter(|event| event.switches_to.is_some());
            return switch_seconds(due.count(), &run.events);
        }
        // The first is no change.
        "switches" => return run.carriers.len().checked_sub(1).map(|switches| switches as f64),
        _ => {}
    }
    let (server, agent) = (run.server?, run.agent?);
    let per_session = |grown: i64| {
        let sessions = scenario.staying_sessions();
        (sessions > 0).then(|| grown as f64 / 1024.0 / f64::from(sessions))
    };
    match measure {
        "cpu_per_gib" => {
            let gib = run.payload_bytes as f64 / f64::from(1 << 30);
            Some((server.cpu_seconds + agent.cpu_seconds) / gib)
        }
        "server_memory_per_session" => per_session(server.grown_memory),
        "agent_memory_per_session" => per_session(agent.grown_memory),
        _ => None,
    }
}

/// The slowest of the switches that are due; `None` when one of them did not happen.
fn switch_seconds(due: usize, events: &[Event]) -> Option<f64> {
    let came = events.iter().filter_map(|event| {
        let switch = event.switch.filter(|switch| Some(switch.to) == event.switches_to);
        switch.map(|switch| switch.seconds)
    });
    let came: Vec<_> = came.collect();
    (came.len() == due).then(|| came.into_iter().reduce(f64::max))?
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{carrier::Carrier, report::Switch};

    fn goal(at_most: Option<f64>, at_least_times: Option<f64>) -> Goal {
        let measure = "keys.p50".into();
        let (at_least, at_most_times) = (None, None);
        Goal { peers: Vec::new(), measure, at_most, at_least, at_most_times, at_least_times }
    }

    #[test]
    fn a_limit_is_reached_or_missed() {
        for (measured, reached) in [(Some(60.0), true), (Some(60.1), false), (None, false)] {
            let result = goal(Some(60.0), None).result("culvert-grpc".into(), measured, None);
            assert_eq!(result.reached, reached, "{measured:?}");
            assert_eq!(result.goal, "keys p50 ≤ 60 ms");
        }
    }

    #[test]
    fn a_ratio_needs_both_sides() {
        let goal = goal(None, Some(3.0));
        let judged = |ours, theirs| goal.result("culvert-grpc".into(), ours, theirs);
        assert!(judged(Some(9.0), Some(3.0)).reached);
        assert!(!judged(Some(8.0), Some(3.0)).reached);
        assert!(!judged(Some(8.0), None).reached);
        assert!(!judged(Some(8.0), Some(0.0)).reached);
        assert_eq!(judged(Some(9.0), Some(3.0)).goal, "keys p50 ≥ 3 × Konnectivity's");
    }

    #[test]
    fn every_switch_that_is_due_must_come_and_the_slowest_counts() {
        let event = |due: Option<Carrier>, came: Option<(Carrier, f64)>| Event {
            second: 0.0,
            what: String::new(),
            switches_to: due,
            switch: came.map(|(to, seconds)| Switch { to, seconds }),
        };
        let (quic, tcp) = (Carrier::Quic, Carrier::Tcp);
        let slow = event(Some(tcp), Some((tcp, 2.5)));
        let quick = event(Some(quic), Some((quic, 0.5)));
        let not_due = event(None, Some((tcp, 9.0)));
        let wrong = event(Some(quic), Some((tcp, 0.1)));
        let never = event(Some(tcp), None);
        let events = [slow.clone(), not_due, quick];
        assert_eq!(switch_seconds(2, &events), Some(2.5));
        assert_eq!(switch_seconds(3, &events), None);
        assert_eq!(switch_seconds(2, &[slow.clone(), wrong]), None);
        assert_eq!(switch_seconds(2, &[slow, never]), None);
    }
}
