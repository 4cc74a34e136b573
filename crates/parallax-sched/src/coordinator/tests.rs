//! Members come, go, restart and fall silent, in virtual time.

use proptest::prelude::*;

use super::*;
use crate::PlanOptions;

fn ms(ms: u64) -> Duration {
    Duration::from_millis(ms)
}

fn coordinator(n_layers: u32) -> Coordinator {
    let plan =
        PlanOptions { max_pipelines: 1, more_nodes_slack: 4.0, context_tokens: 0, ..PlanOptions::default() };
    let config = CoordinatorConfig { plan, ..CoordinatorConfig::default() };
    Coordinator::new(ModelProfile::uniform("m", n_layers, 10), config).unwrap()
}

fn join(c: &mut Coordinator, now: u64, name: &str, room: u64, incarnation: u64) -> Result<(), JoinError> {
    c.join(ms(now), NodeProfile::new(name, room * 10, 1.0), incarnation, Vec::new(), "test".into())
}

fn ready(c: &mut Coordinator, now: u64, name: &str, incarnation: u64) -> bool {
    let report = Report { epoch: c.view().epoch, state: MemberState::Ready, ..Report::default() };
    c.heartbeat(ms(now), &NodeId::new(name), incarnation, report)
}

#[test]
fn two_joins_make_one_plan_and_it_serves_when_both_are_ready() {
    let mut c = coordinator(4);
    join(&mut c, 0, "a", 2, 1).unwrap();
    join(&mut c, 100, "b", 2, 1).unwrap();
    assert!(!c.tick(ms(200), false), "still settling");
    assert!(c.tick(ms(400), false));
    assert_eq!(c.view().epoch, 1);
    assert!(ready(&mut c, 450, "a", 1));
    assert!(!c.is_serving());
    assert!(c.why().contains("waiting for b with layers 2..4"), "{}", c.why());
    assert!(ready(&mut c, 450, "b", 1));
    assert!(c.is_serving());
    assert_eq!(c.why(), "serving");
}

#[test]
fn weights_are_staged_when_every_member_says_so_and_the_plan_goes_on_in_a_new_epoch() {
    let mut c = coordinator(4);
    assert!(matches!(c.unstaged("next"), Err(StagingError::NoPlan(_))));
    join(&mut c, 0, "a", 2, 1).unwrap();
    join(&mut c, 0, "b", 2, 1).unwrap();
    c.tick(ms(300), false);
    let say = |c: &mut Coordinator, name: &str, id: &str, failure: Option<&str>| {
        let staged = Staged { checkpoint_id: id.into(), failure: failure.map(str::to_owned) };
        let state = MemberState::Ready;
        let report = Report { epoch: c.view().epoch, state, staged: Some(staged), ..Report::default() };
        c.heartbeat(ms(300), &NodeId::new(name), 1, report);
        c.unstaged("next")
    };
    assert_eq!(say(&mut c, "a", "next", None).unwrap(), [NodeId::new("b")]);
    assert_eq!(say(&mut c, "b", "an older one", None).unwrap(), [NodeId::new("b")]);
    let refusal = say(&mut c, "b", "next", Some("no room")).unwrap_err();
    assert_eq!(refusal.to_string(), "b cannot stage them: no room");
    assert_eq!(say(&mut c, "b", "next", None).unwrap(), []);

    let before = c.view().clone();
    assert!(c.is_serving());
    c.renew();
    assert_eq!((c.view().epoch, &c.view().plan), (before.epoch + 1, &before.plan));
    assert!(!c.is_serving(), "the members have it to take up");
    assert!(!c.tick(ms(310), false));
}

#[test]
fn a_silent_member_is_forgotten_and_named_and_its_return_makes_a_new_epoch() {
    let mut c = coordinator(4);
    join(&mut c, 0, "a", 2, 1).unwrap();
    join(&mut c, 0, "b", 2, 1).unwrap();
    c.tick(ms(300), false);
    for now in (300..3000).step_by(250) {
        ready(&mut c, now, "a", 1);
        c.tick(ms(now), false);
    }
    assert!(c.view().plan.is_err());
    assert!(c.why().contains("b with layers 2..4 sent no heartbeat"), "{}", c.why());
    assert!(!ready(&mut c, 3000, "b", 1), "a forgotten member must join again");
    join(&mut c, 3000, "b", 2, 2).unwrap();
    ready(&mut c, 3250, "a", 1);
    ready(&mut c, 3250, "b", 2);
    assert!(c.tick(ms(3300), false));
    assert!(!c.is_serving(), "nobody runs the new epoch yet");
    assert!(ready(&mut c, 3400, "a", 1) && ready(&mut c, 3400, "b", 2));
    assert!(c.is_serving());
}

#[test]
fn ghosts_of_older_incarnations_are_ignored() {
    let mut c = coordinator(4);
    join(&mut c, 0, "a", 4, 7).unwrap();
    c.tick(ms(300), false);
    assert!(!ready(&mut c, 310, "a", 6));
    c.leave(ms(320), &NodeId::new("a"), 6);
    assert!(c.member(&NodeId::new("a")).is_some());
    assert!(matches!(join(&mut c, 330, "a", 4, 5), Err(JoinError::Ghost { newest: 7, .. })));
    c.leave(ms(340), &NodeId::new("a"), 7);
    assert!(matches!(join(&mut c, 350, "a", 4, 6), Err(JoinError::Ghost { .. })), "graves remember");
    join(&mut c, 360, "a", 4, 8).unwrap();
}

#[test]
fn a_restart_breaks_the_plan_at_once() {
    let mut c = coordinator(4);
    join(&mut c, 0, "a", 4, 1).unwrap();
    c.tick(ms(300), false);
    ready(&mut c, 310, "a", 1);
    assert!(c.is_serving());
    join(&mut c, 320, "a", 4, 2).unwrap();
    assert!(c.tick(ms(321), true), "a broken plan does not wait");
    assert_eq!(c.view().epoch, 2);
    assert!(!c.is_serving());
}

#[test]
fn a_better_plan_waits_until_no_request_is_in_flight() {
    let mut c = coordinator(8);
    join(&mut c, 0, "a", 8, 1).unwrap();
    c.tick(ms(300), false);
    ready(&mut c, 310, "a", 1);
    join(&mut c, 400, "b", 8, 1).unwrap();
    assert!(!c.tick(ms(900), true));
    assert!(c.is_serving());
    assert!(c.tick(ms(910), false));
    assert_eq!(c.view().plan.as_ref().unwrap().pipelines[0].stages.len(), 2);
}

#[test]
fn a_member_that_fails_to_load_is_left_out_with_its_reason() {
    let mut c = coordinator(4);
    join(&mut c, 0, "a", 4, 1).unwrap();
    c.tick(ms(300), false);
    let report = Report {
        epoch: 1,
        state: MemberState::Failed,
        detail: "the disk is full".into(),
        ..Report::default()
    };
    c.heartbeat(ms(310), &NodeId::new("a"), 1, report);
    c.tick(ms(320), false);
    assert!(c.why().contains("the disk is full"), "{}", c.why());
}

#[test]
fn a_full_swarm_refuses_more() {
    let config = CoordinatorConfig { max_members: 1, ..CoordinatorConfig::default() };
    let mut c = Coordinator::new(ModelProfile::uniform("m", 4, 10), config).unwrap();
    join(&mut c, 0, "a", 2, 1).unwrap();
    assert!(matches!(join(&mut c, 0, "b", 2, 1), Err(JoinError::Full { limit: 1 })));
}

proptest! {
    #[test]
    fn any_history_keeps_plans_valid_and_epochs_rising(
        events in proptest::collection::vec((0u8..5, 0usize..4, 1u64..400), 1..60),
    ) {
        let mut c = coordinator(6);
        let (mut now, mut epoch) = (0, 0);
        let mut incarnations = [0u64; 4];
        for (kind, who, dt) in events {
            now += dt;
            let name = format!("n{who}");
            let id = NodeId::new(&name);
            match kind {
                0 => {
                    incarnations[who] += 1;
                    join(&mut c, now, &name, 2 + who as u64, incarnations[who]).unwrap();
                }
                1 => c.leave(ms(now), &id, incarnations[who]),
                2 => c.lost(ms(now), &id),
                _ => { ready(&mut c, now, &name, incarnations[who]); }
            }
            let changed = c.tick(ms(now), kind == 3);
            prop_assert!(c.view().epoch >= epoch);
            prop_assert_eq!(changed, c.view().epoch != epoch);
            epoch = c.view().epoch;
            let nodes: Vec<NodeProfile> = c.members().map(|(_, m)| m.profile.clone()).collect();
            if let Ok(plan) = &c.view().plan {
                // A plan may still name a node that went while a merely better plan was put off, but never one that it uses.
                prop_assert_eq!(plan.defect(c.model(), &nodes, 0), None);
            } else {
                prop_assert!(!c.is_serving());
            }
        }
    }
}
